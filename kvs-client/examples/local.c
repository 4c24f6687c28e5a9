/*
 * Reads straight from the shared memory of a store on this machine, whether a server runs or not.
 *
 *     cc -I../include local.c -lpsiskv -o local && ./local kvs 35
 */
#include <stdio.h>
#include <stdlib.h>

#include "psiskv_local.h"

int main(int argc, char **argv)
{
    char value[256];
    uint32_t key = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 35;
    int kv = kv_local_open(argc > 1 ? argv[1] : "kvs");
    int length = kv_local_read(kv, key, value, sizeof value);

    if (length < 0) {
        fprintf(stderr, length == -2 ? "no such key\n" : "no store to read from\n");
        return 1;
    }
    printf("%u is \"%.*s\"\n", key, length < (int)sizeof value ? length : (int)sizeof value, value);
    kv_local_close(kv);
    return 0;
}
