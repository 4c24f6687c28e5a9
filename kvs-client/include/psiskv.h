/*
 * psiskv: the C library of kvs, a key-value store.
 *
 *     cc app.c -lpsiskv
 *
 * Descriptors are small positive integers, valid in every thread of the process and independent of each other. Calls on one descriptor
 * take turns; threads that are to work at the same time use a descriptor each. After fork() the child calls kv_connect itself: on an
 * inherited descriptor every call returns -1.
 *
 * When the connection breaks, because the servers died or were started again, the library connects again by itself, under the same
 * descriptor, and repeats what was not answered. Each call is executed exactly once all the same: a kv_write that was executed just
 * before the servers died returns 0, not -2. It tries for ten seconds, or for as many milliseconds as the environment variable
 * KVS_RETRY_MS says when kv_connect is called; then the call returns -1, and the next one tries again.
 *
 * With KVS_LOCAL_READS=1 in the environment when kv_connect is called, kv_read reads from the server's shared memory when the server
 * is on this machine and belongs to the same user, and asks the server for what can't be read there. What was acknowledged is seen
 * either way. psiskv_local.h has reads that need no server at all.
 */
#ifndef PSISKV_H
#define PSISKV_H

#include <stdint.h>

/* Not needed here; programs written against earlier versions rely on them. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Connects to the store whose front server listens on this address ("127.0.0.1" or a host name) and port.
 * Returns a positive descriptor, or -1 on any error: unknown address, refused, not a kvs server.
 */
int kv_connect(char *kv_server_ip, int kv_server_port);

/*
 * Closes the descriptor. A bad or closed one is ignored.
 */
void kv_close(int kv_descriptor);

/*
 * Stores value_length bytes under key. With kv_overwrite 0, only if the key does not exist.
 * Returns  0 when stored,
 *         -2 when the key exists and kv_overwrite is 0,
 *         -1 on any other error. When no connection could be had again, or the servers have lost their memory (the machine was
 *         started again) while the call ran, it may have been stored or not.
 */
int kv_write(int kv_descriptor, uint32_t key, char *value, uint32_t value_length, int kv_overwrite);

/*
 * Copies the value under key, at most value_length bytes of it, and nothing behind them.
 * Returns the length of the stored value, which may be larger than value_length,
 *         -2 when there is no such key,
 *         -1 on any other error.
 */
int kv_read(int kv_descriptor, uint32_t key, char *value, uint32_t value_length);

/*
 * Removes the key.
 * Returns 0 when it was removed, -1 otherwise.
 */
int kv_delete(int kv_descriptor, uint32_t key);

#ifdef __cplusplus
}
#endif

#endif
