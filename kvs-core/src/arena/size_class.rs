//! Which block size serves which request, up to what fits a slab several times.
//!
//! Steps of an eighth to a quarter keep the waste small; the larger classes are what divides a slab evenly.

use super::slab::{SLAB_BYTES, SLAB_HEADER_BYTES};
use crate::segment::layout::SIZE_CLASSES;

/// Block sizes, in bytes, all multiples of 16. Those that are multiples of 64 begin on a cache line.
pub const SIZES: [u64; SIZE_CLASSES] = [
    32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1072, 1344, 1616,
    2032, 2704, 3248, 4064,
];

/// Largest block of a slab, in bytes.
pub const SIZE_MAX: u64 = SIZES[SIZE_CLASSES - 1];

/// Number of blocks in a slab of the smallest class: what a slab's bitmap must have room for.
pub const BLOCKS_MAX: u64 = blocks(0);

const STEP: u64 = 16;

/// Class of a request of `index * 16` bytes.
const CLASS_OF: [u8; (SIZE_MAX / STEP) as usize + 1] = {
    let mut table = [0; (SIZE_MAX / STEP) as usize + 1];
    let (mut index, mut class) = (0, 0);
    while index < table.len() {
        if index as u64 * STEP > SIZES[class] {
            class += 1;
        }
        table[index] = class as u8;
        index += 1;
    }
    table
};

const _: () = {
    let mut class = 0;
    while class < SIZE_CLASSES {
        assert!(SIZES[class].is_multiple_of(STEP));
        assert!(class == 0 || SIZES[class - 1] < SIZES[class]);
        class += 1;
    }
};

/// The smallest class whose blocks hold `bytes`; None when only block lists do.
pub const fn class_for(bytes: u64) -> Option<usize> {
    if bytes > SIZE_MAX { None } else { Some(CLASS_OF[bytes.div_ceil(STEP) as usize] as usize) }
}

/// How many blocks of `class` a slab holds.
pub const fn blocks(class: usize) -> u64 {
    (SLAB_BYTES - SLAB_HEADER_BYTES) / SIZES[class]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_for_gives_the_smallest_that_fits() {
        for bytes in 0..=SIZE_MAX {
            let class = class_for(bytes).expect("within the largest");
            assert!(SIZES[class] >= bytes);
            assert!(class == 0 || SIZES[class - 1] < bytes);
        }
        assert_eq!(class_for(SIZE_MAX + 1), None);
    }

    #[test]
    fn sizes_waste_at_most_a_third_and_fill_their_slabs() {
        for class in 1..SIZE_CLASSES {
            assert!(SIZES[class] - SIZES[class - 1] <= SIZES[class] / 3, "{}", SIZES[class]);
            let used = blocks(class) * SIZES[class] + SLAB_HEADER_BYTES;
            assert!(used * 100 >= SLAB_BYTES * 93, "{} fills {used}", SIZES[class]);
        }
    }
}
