/*
 * Reads what another program stores, with nothing but psiskv_local.h: the name of the instance, then how long the value of key 7 is,
 * which consists of the letter 'x'. Key 8 is an empty value, key 9 does not exist.
 */
#include "psiskv_local.h"

#include <string.h>

#include "check.h"

int main(int argc, char **argv)
{
    static char value[1 << 20], expected[1 << 20];
    int kv, other, length;

    CHECK_EQUAL(argc, 3);
    length = atoi(argv[2]);
    kv = kv_local_open(argv[1]);
    other = kv_local_open(argv[1]);
    CHECK(kv > 0 && other > 0 && kv != other);

    memset(value, '-', sizeof value);
    memset(expected, '-', sizeof expected);
    memset(expected, 'x', (size_t)length);
    CHECK_EQUAL(kv_local_read(kv, 7, value, sizeof value), length);
    CHECK(memcmp(value, expected, sizeof value) == 0);
    CHECK_EQUAL(kv_local_read(kv, 8, value, sizeof value), 0);
    CHECK_EQUAL(kv_local_read(kv, 9, value, sizeof value), -2);

    memset(value, '-', sizeof value);
    memset(expected, '-', sizeof expected);
    memset(expected, 'x', 3);
    CHECK_EQUAL(kv_local_read(kv, 7, value, 3), length);
    CHECK(memcmp(value, expected, sizeof value) == 0);
    CHECK_EQUAL(kv_local_read(kv, 7, NULL, 0), length);
    CHECK_EQUAL(kv_local_read(kv, 7, NULL, 3), -1);

    kv_local_close(kv);
    CHECK_EQUAL(kv_local_read(kv, 7, value, sizeof value), -1);
    CHECK_EQUAL(kv_local_read(other, 7, value, sizeof value), length);
    kv_local_close(kv);
    kv_local_close(-1);
    kv_local_close(other);
    CHECK_EQUAL(kv_local_open(NULL), -1);
    CHECK_EQUAL(kv_local_open("no/name"), -1);
    CHECK_EQUAL(kv_local_open("no-such-instance-anywhere"), -1);
    CHECK_EQUAL(kv_local_read(4711, 7, value, sizeof value), -1);
    return 0;
}
