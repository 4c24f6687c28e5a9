/*
 * psiskv_local: reads straight from the shared memory of a kvs store on this machine, in the same library as psiskv.h.
 *
 *     cc app.c -lpsiskv
 *
 * No server takes part, and a read makes no system call, but for a look at the segment's name about ten times a second while it is
 * used. Reads go on while the servers are dead, are replaced or grow the table; a write is seen as soon as it is acknowledged. When the
 * store is purged, reads return -1 until it is started again; then they go on with the new one, under the same descriptor.
 *
 * The store must belong to the same user. Descriptors are small positive integers, valid in every thread of the process, but no
 * descriptors of psiskv.h. Calls on one descriptor take turns; threads that are to read at the same time open one each. A process has
 * at most 1024. After fork() the child opens its own.
 */
#ifndef PSISKV_LOCAL_H
#define PSISKV_LOCAL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Opens the store of the instance of this name ("kvs", unless its servers were started with --name).
 * Returns a positive descriptor, or -1 on any error: no such store, it is another user's, it is still being loaded.
 */
int kv_local_open(const char *name);

/*
 * Copies the value under key, at most value_length bytes of it, and nothing behind them.
 * Returns the length of the stored value, which may be larger than value_length,
 *         -2 when there is no such key,
 *         -1 on any other error: there is no store any more, or the value is replaced all the time faster than it can be copied.
 */
int kv_local_read(int kv_local, uint32_t key, char *value, uint32_t value_length);

/*
 * Closes the descriptor. A bad or closed one is ignored.
 */
void kv_local_close(int kv_local);

#ifdef __cplusplus
}
#endif

#endif
