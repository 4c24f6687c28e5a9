//! Shared memory seen as 8-byte words.
//!
//! Two types look at the same bytes. [`View`] only reads; it is what a local reader or a tool holds, and no
//! method of it writes. [`Memory`] writes too and dereferences to a `View`.
//!
//! Invariants
//! - Every access is bounds-checked against the mapping; an offset found in the segment is never trusted, so a
//!   damaged segment gives [`Damaged`], not a signal.
//! - Shared words are only ever read and written as atomics of eight bytes. Loads are `Acquire` and stores
//!   `Release`: loads stay in program order among themselves, and so do stores. That, and nothing more, is what
//!   the commit protocol and the lock-free reads are built on.
//! - A dead process's finished stores are visible to its successor: no fence is needed against `kill -9`, only
//!   the compiler must keep the order, and atomics make it.
//!
//! A crash in here leaves the mapping to the kernel; nothing of this module outlives the process.
#![allow(unsafe_code)]

use std::alloc::Layout;
use std::io;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::mm::{Advice, MapFlags, ProtFlags};

#[cfg(not(target_endian = "little"))]
compile_error!("the segment's layout is defined for little-endian machines only");

/// Size of a word, in bytes.
pub const WORD_BYTES: u64 = 8;

/// Size of a huge page, in bytes; segments begin at a multiple of it in every process.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// `MADV_COLLAPSE` of `linux/mman.h`, since Linux 6.1.
const MADV_COLLAPSE: libc::c_int = 25;

/// Something in the segment that cannot be: an offset out of bounds or misaligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the segment is damaged at offset {offset:#x}; run `kvs-tools check` to see what is wrong")]
pub struct Damaged {
    /// Where, in bytes from the start of the segment.
    pub offset: u64,
}

/// Byte offset of a `T` from the start of the segment; the only kind of pointer kept inside it.
pub struct Offset<T> {
    bytes: u64,
    of: PhantomData<fn() -> T>,
}

impl<T> Offset<T> {
    /// The offset `bytes` into the segment.
    pub const fn new(bytes: u64) -> Self {
        Self { bytes, of: PhantomData }
    }

    /// In bytes from the start of the segment.
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// The offset of element `index` of an array that starts here.
    pub const fn index(self, index: u64) -> Self {
        Self::new(self.bytes.saturating_add(index.saturating_mul(size_of::<T>() as u64)))
    }
}

impl<T> Clone for Offset<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Offset<T> {}

/// What may be laid over shared memory.
///
/// # Safety
/// The type is `repr(C)`, made of [`Word`]s, [`super::robust_mutex::RobustMutex`]es and arrays of those only:
/// any bit pattern is valid, it is never moved, and it is changed through atomics or the lock alone.
pub unsafe trait Shared {}

/// One shared word of eight bytes. It can be read by whoever sees it; only [`Memory`] can change it.
#[repr(transparent)]
pub struct Word(AtomicU64);

// SAFETY: a `Word` is an atomic; every bit pattern is a valid value.
unsafe impl Shared for Word {}

/// Declares a `repr(C)` structure of the segment with its size in bytes, asserted at compile time.
#[macro_export]
macro_rules! shared_struct {
    ($(#[$meta:meta])* $visibility:vis struct $name:ident, $size:expr, {
        $($(#[$field_meta:meta])* $field:ident: $type:ty,)*
    }) => {
        $(#[$meta])*
        #[repr(C)]
        $visibility struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
        }
        const _: () = assert!(size_of::<$name>() == $size);
        const _: () = {
            const fn shared<T: $crate::sys::memory::Shared>() {
            }
            $(shared::<$type>();)*
        };
        // SAFETY: `repr(C)`, and every field was just proven to be `Shared`; the size leaves no hidden padding
        // that matters, since any bit pattern is valid.
        #[allow(unsafe_code)]
        unsafe impl $crate::sys::memory::Shared for $name {}
    };
}

// SAFETY: an array of shared things is laid out as those things one after the other.
unsafe impl<T: Shared, const N: usize> Shared for [T; N] {}

/// Lets the model checker switch threads here, now and then: what goes wrong goes wrong when one thread gets far while
/// another stands still. Nothing at all otherwise.
#[inline(always)]
fn schedule() {
    #[cfg(feature = "shuttle")]
    {
        use shuttle::rand::Rng;
        if shuttle::rand::thread_rng().gen_ratio(1, 24) {
            shuttle::sync::atomic::AtomicBool::new(false).load(Ordering::SeqCst);
        }
    }
}

impl Word {
    /// The word's value, ordered before every later load.
    #[inline(always)]
    pub fn load(&self) -> u64 {
        schedule();
        self.0.load(Ordering::Acquire)
    }
}

/// Size of a page, in bytes. The memory of a heap segment begins at a multiple of it, as a mapping does.
const SMALL_PAGE_BYTES: usize = 4096;

enum Owner {
    Mapping,
    /// What was allocated, which begins up to [`SMALL_PAGE_BYTES`] before the memory.
    Heap(NonNull<u8>, Layout),
    #[allow(dead_code, reason = "kept so that a view's memory lives as long as the view")]
    Shared(std::sync::Arc<Memory>),
}

/// Shared memory that can only be read.
pub struct View {
    base: NonNull<u8>,
    length: u64,
    owner: Owner,
}

// SAFETY: all access goes through atomics (or through the explicitly unsafe `Memory::bytes_mut`).
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

/// How a mapping may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    PrivateCopy,
}

fn map(fd: BorrowedFd<'_>, length: u64, access: Access) -> io::Result<View> {
    let (protection, flags) = match access {
        Access::Read => (ProtFlags::READ, MapFlags::SHARED),
        Access::Write => (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED),
        Access::PrivateCopy => (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE),
    };
    let size = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
    let base = if size < HUGE_PAGE_BYTES as usize {
        // SAFETY: a new mapping at an address the kernel chooses overlaps nothing of ours.
        unsafe { rustix::mm::mmap(std::ptr::null_mut(), size, protection, flags, fd, 0)? }
    } else {
        let place = reserve_addresses(size)?;
        // SAFETY: these addresses were reserved by the line before, and nobody else knows them.
        unsafe { rustix::mm::mmap(place, size, protection, flags | MapFlags::FIXED, fd, 0)? }
    };
    let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
    // A core dump of gigabytes would hold sockets and locks for as long as it takes to write.
    // SAFETY: advice on the mapping just made; it changes no contents.
    let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), size, Advice::LinuxDontDump) };
    Ok(View { base, length, owner: Owner::Mapping })
}

/// Addresses for `size` bytes that begin at a multiple of the huge page: only then can the kernel map huge pages of a file
/// that begins there, too. There is nothing behind them yet.
fn reserve_addresses(size: usize) -> io::Result<*mut std::ffi::c_void> {
    let huge = HUGE_PAGE_BYTES as usize;
    // A mapping ends at the end of a page, whatever length is asked for.
    let size = size.checked_next_multiple_of(SMALL_PAGE_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: new addresses, which the kernel chooses and nobody can read or write.
    let start =
        unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), size + huge, ProtFlags::empty(), flags)? };
    let before = start.cast::<u8>().align_offset(huge);
    // SAFETY: all of it lies in what was just mapped, which is one huge page longer than `size`.
    unsafe {
        let place = start.byte_add(before);
        if before > 0 {
            rustix::mm::munmap(start, before)?;
        }
        if huge > before {
            rustix::mm::munmap(place.byte_add(size), huge - before)?;
        }
        Ok(place)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        match self.owner {
            // SAFETY: the mapping was made by `map` with this base and length and nobody can borrow it any more.
            Owner::Mapping => unsafe {
                let _ = rustix::mm::munmap(self.base.as_ptr().cast(), self.length as usize);
            },
            // SAFETY: allocated by `Memory::heap` with this layout.
            Owner::Heap(start, layout) => unsafe { std::alloc::dealloc(start.as_ptr(), layout) },
            Owner::Shared(_) => {}
        }
    }
}

impl View {
    /// Maps `length` bytes of `fd` for reading only (`PROT_READ`).
    ///
    /// # Errors
    /// What `mmap` says.
    pub fn map(fd: BorrowedFd<'_>, length: u64) -> io::Result<Self> {
        map(fd, length, Access::Read)
    }

    /// A read-only view of memory that this process also writes.
    pub fn of(memory: &std::sync::Arc<Memory>) -> Self {
        Self {
            base: memory.view.base,
            length: memory.view.length,
            owner: Owner::Shared(std::sync::Arc::clone(memory)),
        }
    }

    /// Bytes mapped.
    #[inline(always)]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// All of it.
    #[inline(always)]
    pub fn whole(&self) -> Window<'_> {
        Window { base: self.base, start: 0, end: self.length, of: PhantomData }
    }

    /// The part from offset `start` up to `end`, as far as it is mapped.
    #[inline(always)]
    pub fn window(&self, start: u64, end: u64) -> Window<'_> {
        Window { start, end: end.min(self.length), ..self.whole() }
    }

    #[inline(always)]
    fn pointer(&self, offset: u64, length: u64, alignment: u64) -> Result<*mut u8, Damaged> {
        self.whole().pointer(offset, length, alignment)
    }

    /// The word at `offset`.
    ///
    /// # Errors
    /// [`Damaged`] when it lies outside or is misaligned.
    #[inline(always)]
    pub fn word(&self, offset: u64) -> Result<&Word, Damaged> {
        self.object(Offset::new(offset))
    }

    /// The object at `offset`.
    ///
    /// # Errors
    /// [`Damaged`] when it lies outside or is misaligned.
    #[inline(always)]
    pub fn object<T: Shared>(&self, offset: Offset<T>) -> Result<&T, Damaged> {
        let pointer = self.pointer(offset.bytes(), size_of::<T>() as u64, align_of::<T>() as u64)?;
        // SAFETY: in bounds and aligned (the base is page- or cache-line-aligned); `T: Shared` is valid for any
        // bits and only changed atomically; the mapping lives as long as `self`.
        Ok(unsafe { &*pointer.cast::<T>() })
    }

    /// `count` words from `offset` on.
    ///
    /// # Errors
    /// [`Damaged`] when they lie outside or are misaligned.
    pub fn words(&self, offset: u64, count: u64) -> Result<&[Word], Damaged> {
        self.whole().words(offset, count)
    }

    /// Asks the processor to bring the cache line at `offset` near; harmless for any offset.
    #[inline(always)]
    pub fn prefetch(&self, offset: u64) {
        self.whole().prefetch(offset);
    }

    /// Copies `target.len()` bytes from `offset`; see [`Window::read_bytes`].
    ///
    /// # Errors
    /// [`Damaged`] when the range lies outside.
    #[inline]
    pub fn read_bytes(&self, offset: u64, target: &mut [u8]) -> Result<(), Damaged> {
        self.whole().read_bytes(offset, target)
    }

    /// The words that `length` bytes from `offset` lie in, and how many bytes of the first one come before them.
    #[inline(always)]
    fn words_around(&self, offset: u64, length: usize) -> Result<(*const AtomicU64, usize), Damaged> {
        self.whole().words_around(offset, length)
    }

    /// Whether the bytes at the word-aligned `offset` equal `expected`; see [`Window::equal_bytes`].
    ///
    /// # Errors
    /// [`Damaged`] when the range lies outside or is misaligned.
    #[inline]
    pub fn equal_bytes(&self, offset: u64, expected: &[u8]) -> Result<bool, Damaged> {
        self.whole().equal_bytes(offset, expected)
    }
}

/// A part of a view, known by its offsets in the whole: what a reader may touch of it, as memory is reserved there. Touching what is
/// not would take memory from `/dev/shm`, or end the process with a signal when that is full.
#[derive(Clone, Copy)]
pub struct Window<'v> {
    base: NonNull<u8>,
    start: u64,
    end: u64,
    of: PhantomData<&'v View>,
}

impl<'v> Window<'v> {
    #[inline(always)]
    fn pointer(self, offset: u64, length: u64, alignment: u64) -> Result<*mut u8, Damaged> {
        let fits = self.end.checked_sub(length).is_some_and(|last| offset >= self.start && offset <= last);
        if !fits || !offset.is_multiple_of(alignment) {
            return Err(Damaged { offset });
        }
        // SAFETY: `offset` lies inside the window, as just checked, and that inside the mapping.
        Ok(unsafe { self.base.as_ptr().add(offset as usize) })
    }

    /// The word at `offset`.
    ///
    /// # Errors
    /// [`Damaged`] when it lies outside or is misaligned.
    #[inline(always)]
    pub fn word(self, offset: u64) -> Result<&'v Word, Damaged> {
        let pointer = self.pointer(offset, WORD_BYTES, WORD_BYTES)?;
        // SAFETY: in bounds and aligned, as just checked; words are valid for any bits and only changed atomically; the view, and
        // so the mapping, outlives the window.
        Ok(unsafe { &*pointer.cast::<Word>() })
    }

    /// `count` words from `offset` on.
    ///
    /// # Errors
    /// [`Damaged`] when they lie outside or are misaligned.
    pub fn words(self, offset: u64, count: u64) -> Result<&'v [Word], Damaged> {
        let length = count.checked_mul(WORD_BYTES).ok_or(Damaged { offset })?;
        let pointer = self.pointer(offset, length, WORD_BYTES)?;
        // SAFETY: in bounds and aligned, as just checked; words are valid for any bits and only changed atomically.
        Ok(unsafe { std::slice::from_raw_parts(pointer.cast::<Word>(), count as usize) })
    }

    /// Asks the processor to bring the cache line at `offset` near; harmless for any offset.
    #[inline(always)]
    pub fn prefetch(self, offset: u64) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if (self.start..self.end).contains(&offset) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: the address is inside the window, and a prefetch has no architectural effect.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.base.as_ptr().add(offset as usize).cast()) };
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        let _ = offset;
    }

    /// Copies `target.len()` bytes from `offset`. The bytes may be changing meanwhile: the caller validates
    /// afterwards that they were not.
    ///
    /// # Errors
    /// [`Damaged`] when the range lies outside.
    #[inline]
    pub fn read_bytes(self, offset: u64, target: &mut [u8]) -> Result<(), Damaged> {
        let (source, skip) = self.words_around(offset, target.len())?;
        let (first, rest) = target.split_at_mut(first_part(skip, target.len()));
        let load = |index| {
            schedule();
            // SAFETY: `words_around` checked as many words as the parts below ask for.
            unsafe { &*source.add(index) }.load(Ordering::Relaxed).to_le_bytes()
        };
        if !first.is_empty() {
            first.copy_from_slice(&load(0)[skip..skip + first.len()]);
        }
        let start = usize::from(!first.is_empty());
        let (whole, last) = rest.as_chunks_mut::<8>();
        let end = start + whole.len();
        for (index, bytes) in (start..end).zip(whole) {
            *bytes = load(index);
        }
        if !last.is_empty() {
            last.copy_from_slice(&load(end)[..last.len()]);
        }
        // Every later load, the validating ones too, comes after these.
        fence(Ordering::Acquire);
        Ok(())
    }

    /// The words that `length` bytes from `offset` lie in, and how many bytes of the first one come before them.
    #[inline(always)]
    fn words_around(self, offset: u64, length: usize) -> Result<(*const AtomicU64, usize), Damaged> {
        let skip = offset % WORD_BYTES;
        let bytes = (skip + length as u64).next_multiple_of(WORD_BYTES);
        Ok((self.pointer(offset - skip, bytes, WORD_BYTES)?.cast::<AtomicU64>(), skip as usize))
    }

    /// Whether the bytes at the word-aligned `offset` equal `expected`. As unprotected as [`Window::read_bytes`].
    ///
    /// # Errors
    /// [`Damaged`] when the range lies outside or is misaligned.
    #[inline]
    pub fn equal_bytes(self, offset: u64, expected: &[u8]) -> Result<bool, Damaged> {
        let words = (expected.len() as u64).div_ceil(WORD_BYTES);
        let source = self.pointer(offset, words * WORD_BYTES, WORD_BYTES)?.cast::<AtomicU64>();
        schedule();
        let (whole, rest) = expected.as_chunks::<8>();
        for (index, bytes) in whole.iter().enumerate() {
            // SAFETY: `index < words`, and the range was checked.
            if unsafe { &*source.add(index) }.load(Ordering::Relaxed) != u64::from_le_bytes(*bytes) {
                return Ok(false);
            }
        }
        let equal = rest.is_empty() || {
            // SAFETY: the last, partial word is inside the checked range.
            let word = unsafe { &*source.add(whole.len()) }.load(Ordering::Relaxed);
            word.to_le_bytes()[..rest.len()] == *rest
        };
        fence(Ordering::Acquire);
        Ok(equal)
    }
}

/// How many of `length` bytes lie in a first word of which `skip` bytes are not meant; 0 when it is meant whole.
#[inline(always)]
fn first_part(skip: usize, length: usize) -> usize {
    if skip == 0 { 0 } else { length.min(WORD_BYTES as usize - skip) }
}

/// Shared memory that this process may change.
pub struct Memory {
    view: View,
}

impl Deref for Memory {
    type Target = View;

    #[inline(always)]
    fn deref(&self) -> &View {
        &self.view
    }
}

impl Memory {
    /// Maps `length` bytes of `fd` for reading and writing, shared with every other process.
    ///
    /// # Errors
    /// What `mmap` says.
    pub fn map(fd: BorrowedFd<'_>, length: u64) -> io::Result<Self> {
        Ok(Self { view: map(fd, length, Access::Write)? })
    }

    /// Maps `length` bytes of `fd` so that changes stay in this process: what a verifier recovers without
    /// touching the real segment.
    ///
    /// # Errors
    /// What `mmap` says.
    pub fn map_private_copy(fd: BorrowedFd<'_>, length: u64) -> io::Result<Self> {
        Ok(Self { view: map(fd, length, Access::PrivateCopy)? })
    }

    /// Zeroed memory of this process alone, for model tests of the code that runs on a segment.
    ///
    /// # Panics
    /// When `length` is zero.
    pub fn heap(length: u64) -> Self {
        assert!(length > 0, "a segment has a length");
        // What the allocator has to align it zeroes by writing, all of it; what it needn't is zero from the kernel, and only
        // the pages that are used are ever there. So it is aligned here.
        let layout = Layout::from_size_align(length as usize + SMALL_PAGE_BYTES, align_of::<u64>())
            .expect("a length below the address space");
        // SAFETY: the layout has a size greater than zero.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { std::alloc::handle_alloc_error(layout) };
        let before = start.as_ptr().align_offset(SMALL_PAGE_BYTES);
        // SAFETY: less than the alignment is skipped, and as much was allocated more than is used.
        let base = unsafe { start.add(before) };
        Self { view: View { base, length, owner: Owner::Heap(start, layout) } }
    }

    /// Stores `value` into `word`, ordered after every earlier store.
    #[inline(always)]
    pub fn store(&self, word: &Word, value: u64) {
        schedule();
        #[cfg(test)]
        super::crash::before_store();
        debug_assert!(self.offset_of(word).is_some());
        word.0.store(value, Ordering::Release);
    }

    /// Adds to a counter that has several writers and takes no part in any transaction.
    #[inline(always)]
    pub fn add(&self, word: &Word, value: u64) {
        word.0.fetch_add(value, Ordering::Relaxed);
    }

    /// Offset of `word` if it lies in this memory.
    #[inline(always)]
    pub fn offset_of(&self, word: &Word) -> Option<u64> {
        let offset =
            (std::ptr::from_ref(word) as usize).wrapping_sub(self.view.base.as_ptr() as usize) as u64;
        (offset < self.view.length).then_some(offset)
    }

    /// Writes `source` at `offset`; what is left of the last word is filled up with zeros.
    ///
    /// # Errors
    /// [`Damaged`] when the range lies outside.
    #[inline]
    pub fn write_bytes(&self, offset: u64, source: &[u8]) -> Result<(), Damaged> {
        let (target, skip) = self.words_around(offset, source.len())?;
        let (first, rest) = source.split_at(first_part(skip, source.len()));
        // A reader that sees any of these bytes also sees every store before them.
        fence(Ordering::Release);
        let mut next = 0;
        let mut store = |kept: usize, bytes: &[u8]| {
            schedule();
            #[cfg(test)]
            super::crash::before_store();
            // SAFETY: `words_around` checked as many words as the parts below ask for.
            let word = unsafe { &*target.add(next) };
            let mut value = [0u8; 8];
            if kept > 0 {
                value[..kept].copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes()[..kept]);
            }
            value[kept..kept + bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_le_bytes(value), Ordering::Relaxed);
            next += 1;
        };
        if !first.is_empty() {
            store(skip, first);
        }
        let (whole, last) = rest.as_chunks::<8>();
        for bytes in whole {
            store(0, bytes);
        }
        if !last.is_empty() {
            store(0, last);
        }
        Ok(())
    }

    /// Fills `length` bytes from `offset`, both multiples of the word, with zeros.
    ///
    /// # Errors
    /// [`Damaged`] when the range lies outside or is misaligned.
    pub fn zero(&self, offset: u64, length: u64) -> Result<(), Damaged> {
        for at in (offset..offset.saturating_add(length)).step_by(WORD_BYTES as usize) {
            self.store(self.word(at)?, 0);
        }
        Ok(())
    }

    /// Lets the kernel put the huge page at `offset` in the place of the small ones that are there; what is in them stays. All of
    /// it must be reserved: where it isn't, memory is taken. Whoever touches it meanwhile waits until it is copied.
    ///
    /// # Errors
    /// What the kernel says, and `InvalidInput` for what is no whole huge page of this memory.
    pub fn collapse(&self, offset: u64) -> io::Result<()> {
        let outside = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let start = self.pointer(offset, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES).map_err(outside)?;
        // SAFETY: the range lies in the mapping, as just checked; what it contains doesn't change.
        let refused = unsafe { libc::madvise(start.cast(), HUGE_PAGE_BYTES as usize, MADV_COLLAPSE) } != 0;
        if refused { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Maps the pages of a range into this process, as touching each one would. All of it must be reserved: where it isn't, memory
    /// is taken. Nobody else has to wait.
    ///
    /// # Errors
    /// What the kernel says (`MADV_POPULATE_WRITE` is there since Linux 5.14), and `InvalidInput` for a range outside.
    pub fn populate(&self, offset: u64, length: u64) -> io::Result<()> {
        let outside = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let start = self.pointer(offset, length, SMALL_PAGE_BYTES as u64).map_err(outside)?;
        // SAFETY: the range lies in the mapping, as just checked; what it contains doesn't change.
        Ok(unsafe { rustix::mm::madvise(start.cast(), length as usize, Advice::LinuxPopulateWrite) }?)
    }

    /// Bytes that only the caller touches: a connection's buffers.
    ///
    /// # Safety
    /// The range is owned by the caller (a buffer block that the connection slot of the caller's own connection
    /// names) and nobody else reads or writes it while the slice lives.
    ///
    /// # Errors
    /// [`Damaged`] when the range lies outside.
    #[allow(clippy::mut_from_ref, reason = "exclusive by the ownership of the block, not of `self`")]
    pub unsafe fn bytes_mut(&self, offset: u64, length: u64) -> Result<&mut [u8], Damaged> {
        let pointer = self.pointer(offset, length, 1)?;
        // SAFETY: in bounds; exclusive by the caller's contract; bytes have no invalid patterns.
        Ok(unsafe { std::slice::from_raw_parts_mut(pointer, length as usize) })
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn memory_bytes_at_any_offset_come_back_and_keep_what_is_before() {
        let memory = Memory::heap(256);
        for offset in 0..24 {
            for length in 0..40 {
                memory.zero(0, 256).expect("in bounds");
                memory.write_bytes(0, &[9; 24]).expect("in bounds");
                let source: Vec<u8> = (1..=length).collect();
                memory.write_bytes(offset, &source).expect("in bounds");
                let mut target = vec![0; source.len()];
                memory.read_bytes(offset, &mut target).expect("in bounds");
                assert_eq!(target, source);
                let mut before = vec![0; offset as usize];
                memory.read_bytes(0, &mut before).expect("in bounds");
                assert_eq!(before, vec![9; offset as usize]);
            }
        }
    }

    #[test]
    fn memory_outside_is_damage() {
        let memory = Memory::heap(64);
        let mut target = [0; 9];
        assert!(memory.read_bytes(56, &mut target).is_err());
        assert!(memory.read_bytes(u64::MAX - 3, &mut target).is_err());
        assert!(memory.write_bytes(60, &[0; 5]).is_err());
        assert!(memory.word(4).is_err());
        assert!(memory.equal_bytes(64, b"x").is_err());
    }
}
