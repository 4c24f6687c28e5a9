/* Every return value of the contract, from one thread.
 *
 * usage: returns IP PORT CLOSED_PORT STRANGER_PORT MAX_VALUE
 * CLOSED_PORT: nobody listens there. STRANGER_PORT: somebody does who is no kvs server.
 */
#include "psiskv.h"
#include "check.h"

#include <limits.h>
#include <signal.h>

static char *ip;
static int port;

static void connecting(int closed_port, int stranger_port)
{
    char nowhere[] = "no such address", empty[] = "", unroutable[] = "999.1.2.3";

    CHECK_EQUAL(kv_connect(nowhere, port), -1);
    CHECK_EQUAL(kv_connect(empty, port), -1);
    CHECK_EQUAL(kv_connect(unroutable, port), -1);
    CHECK_EQUAL(kv_connect(NULL, port), -1);
    CHECK_EQUAL(kv_connect(ip, closed_port), -1);
    CHECK_EQUAL(kv_connect(ip, stranger_port), -1);
    CHECK_EQUAL(kv_connect(ip, 0), -1);
    CHECK_EQUAL(kv_connect(ip, -1), -1);
    CHECK_EQUAL(kv_connect(ip, 65536), -1);
    CHECK_EQUAL(kv_connect(ip, 65536 + port), -1);
    CHECK_EQUAL(kv_connect(ip, INT_MAX), -1);
}

static void writing(int kv)
{
    char first[] = "first", second[] = "second one", buffer[100];

    CHECK_EQUAL(kv_write(kv, 1, first, 5, 0), 0);
    CHECK_EQUAL(kv_write(kv, 1, second, 10, 0), -2);
    CHECK_EQUAL(kv_read(kv, 1, buffer, sizeof buffer), 5);
    CHECK(memcmp(buffer, "first", 5) == 0);
    CHECK_EQUAL(kv_write(kv, 1, second, 10, 1), 0);
    CHECK_EQUAL(kv_read(kv, 1, buffer, sizeof buffer), 10);
    CHECK(memcmp(buffer, "second one", 10) == 0);
    /* Overwriting what is not there stores it; keys at both ends of the range are keys. */
    CHECK_EQUAL(kv_write(kv, 0, first, 5, 1), 0);
    CHECK_EQUAL(kv_write(kv, UINT32_MAX, second, 10, 1), 0);
    CHECK_EQUAL(kv_read(kv, 0, buffer, sizeof buffer), 5);
    CHECK_EQUAL(kv_read(kv, UINT32_MAX, buffer, sizeof buffer), 10);
}

/* Exactly min(stored, value_length) bytes are written, and nothing behind them. */
static void reading(int kv)
{
    char buffer[64];
    uint32_t room;
    size_t at;

    CHECK_EQUAL(kv_write(kv, 2, "0123456789", 10, 1), 0);
    for (room = 0; room <= 20; room++) {
        memset(buffer, '#', sizeof buffer);
        CHECK_EQUAL(kv_read(kv, 2, buffer, room), 10);
        for (at = 0; at < sizeof buffer; at++)
            CHECK_EQUAL(buffer[at], at < room && at < 10 ? "0123456789"[at] : '#');
    }
    /* Programs exist that pass a length larger than their buffer. */
    memset(buffer, '#', sizeof buffer);
    CHECK_EQUAL(kv_read(kv, 2, buffer, UINT32_MAX), 10);
    CHECK(memcmp(buffer, "0123456789#", 11) == 0);
    CHECK_EQUAL(kv_read(kv, 2, NULL, 0), 10);
    CHECK_EQUAL(kv_read(kv, 2, NULL, 1), -1);
    CHECK_EQUAL(kv_read(kv, 77, buffer, sizeof buffer), -2);
    CHECK_EQUAL(kv_read(kv, 77, NULL, 0), -2);
}

static void values_without_bytes(int kv)
{
    char buffer[4] = "###";

    CHECK_EQUAL(kv_write(kv, 3, NULL, 0, 0), 0);
    CHECK_EQUAL(kv_write(kv, 3, buffer, 0, 0), -2);
    CHECK_EQUAL(kv_write(kv, 3, buffer, 0, 1), 0);
    CHECK_EQUAL(kv_read(kv, 3, buffer, sizeof buffer), 0);
    CHECK_EQUAL(buffer[0], '#');
    CHECK_EQUAL(kv_write(kv, 3, NULL, 1, 1), -1);
    CHECK_EQUAL(kv_read(kv, 3, buffer, sizeof buffer), 0);
    CHECK_EQUAL(kv_delete(kv, 3), 0);
}

static void deleting(int kv)
{
    char buffer[4];

    CHECK_EQUAL(kv_write(kv, 4, "gone", 4, 1), 0);
    CHECK_EQUAL(kv_delete(kv, 4), 0);
    CHECK_EQUAL(kv_delete(kv, 4), -1);
    CHECK_EQUAL(kv_read(kv, 4, buffer, sizeof buffer), -2);
    CHECK_EQUAL(kv_write(kv, 4, "back", 4, 0), 0);
    CHECK_EQUAL(kv_delete(kv, 4), 0);
}

static void large_values(int kv, uint32_t max_value)
{
    char *value = malloc((size_t)max_value + 1), *copy = malloc((size_t)max_value + 1);
    uint32_t at;

    for (at = 0; at <= max_value; at++)
        value[at] = (char)(at * 31 + at / 251);
    CHECK_EQUAL(kv_write(kv, 5, value, max_value, 1), 0);
    CHECK_EQUAL(kv_read(kv, 5, copy, max_value), max_value);
    CHECK(memcmp(value, copy, max_value) == 0);
    /* One byte over the limit is refused, and the descriptor is as good as before. */
    CHECK_EQUAL(kv_write(kv, 5, value, max_value + 1, 1), -1);
    CHECK_EQUAL(kv_read(kv, 5, copy, 3), max_value);
    CHECK_EQUAL(kv_delete(kv, 5), 0);
    free(value);
    free(copy);
}

static void bad_descriptors(int kv)
{
    int bad[] = {0, -1, -2, INT_MIN, INT_MAX, 1000000, 0}, which;
    char buffer[4];

    /* The last one is a descriptor that was closed. */
    bad[6] = kv_connect(ip, port);
    CHECK(bad[6] > 0 && bad[6] != kv);
    kv_close(bad[6]);
    for (which = 0; which < 7; which++) {
        CHECK_EQUAL(kv_write(bad[which], 1, "x", 1, 1), -1);
        CHECK_EQUAL(kv_read(bad[which], 1, buffer, 4), -1);
        CHECK_EQUAL(kv_delete(bad[which], 1), -1);
        kv_close(bad[which]);
    }
    CHECK_EQUAL(kv_read(kv, 0, buffer, 4), 5);
}

static void many_descriptors(void)
{
    int descriptors[100], which;
    char buffer[4];

    for (which = 0; which < 100; which++) {
        descriptors[which] = kv_connect(ip, port);
        CHECK(descriptors[which] > 0 && descriptors[which] < 100000);
    }
    for (which = 0; which < 100; which += 2)
        kv_close(descriptors[which]);
    for (which = 0; which < 100; which++)
        CHECK_EQUAL(kv_read(descriptors[which], 0, buffer, 4), which % 2 ? 5 : -1);
    for (which = 1; which < 100; which += 2)
        kv_close(descriptors[which]);
}

int main(int argc, char **argv)
{
    int kv;

    CHECK_EQUAL(argc, 6);
    ip = argv[1];
    port = atoi(argv[2]);
    connecting(atoi(argv[3]), atoi(argv[4]));
    kv = kv_connect(ip, port);
    CHECK(kv > 0);
    writing(kv);
    reading(kv);
    values_without_bytes(kv);
    deleting(kv);
    large_values(kv, (uint32_t)strtoul(argv[5], NULL, 10));
    bad_descriptors(kv);
    many_descriptors();
    kv_close(kv);
    /* The library leaves signals as they are. */
    CHECK(signal(SIGPIPE, SIG_DFL) == SIG_DFL);
    return 0;
}
