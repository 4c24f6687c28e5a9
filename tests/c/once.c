/* Each call is executed exactly once, whatever becomes of the servers. It writes, overwrites, reads and removes keys of its own until
 * it is told to end by SIGTERM, and finds every return value to be that of a store that never died.
 *
 * usage: once IP PORT FIRST_KEY
 */
#include "psiskv.h"
#include "check.h"

#include <signal.h>

static volatile sig_atomic_t told_to_end;
static char value[60000], found[60000];

static void end(int signal)
{
    (void)signal;
    told_to_end = 1;
}

int main(int argc, char **argv)
{
    uint32_t first, key, round, length;
    int kv;

    CHECK_EQUAL(argc, 4);
    CHECK(signal(SIGTERM, end) != SIG_ERR);
    first = (uint32_t)strtoul(argv[3], NULL, 10);
    kv = kv_connect(argv[1], atoi(argv[2]));
    CHECK(kv > 0);
    for (round = 0; !told_to_end; round++) {
        key = first + round % 100;
        length = round % 50 == 49 ? sizeof value : round % 1000;
        memset(value, 'a' + (int)(round % 26), length);
        CHECK_EQUAL(kv_write(kv, key, value, length, 0), 0);
        CHECK_EQUAL(kv_write(kv, key, "x", 1, 0), -2);
        CHECK_EQUAL(kv_read(kv, key, found, sizeof found), length);
        CHECK(memcmp(found, value, length) == 0);
        CHECK_EQUAL(kv_write(kv, key, "over", 4, 1), 0);
        CHECK_EQUAL(kv_read(kv, key, found, sizeof found), 4);
        CHECK_EQUAL(kv_delete(kv, key), 0);
        CHECK_EQUAL(kv_delete(kv, key), -1);
        CHECK_EQUAL(kv_read(kv, key, found, sizeof found), -2);
    }
    kv_close(kv);
    printf("%u\n", round);
    return 0;
}
