/* One of many programs at once: it has keys of its own, and one that all of them fight for.
 *
 * usage: one_of_many IP PORT NUMBER
 */
#include "psiskv.h"
#include "check.h"

int main(int argc, char **argv)
{
    uint32_t key, number;
    char value[3000], found[3000];
    int kv, round, won;

    CHECK_EQUAL(argc, 4);
    number = (uint32_t)atoi(argv[3]);
    kv = kv_connect(argv[1], atoi(argv[2]));
    CHECK(kv > 0);
    for (round = 0; round < 100; round++) {
        key = 1000000 * (number + 1) + (uint32_t)round;
        memset(value, (int)(number + (uint32_t)round), sizeof value);
        CHECK_EQUAL(kv_write(kv, key, value, 30 * (uint32_t)round, 0), 0);
        won = kv_write(kv, 999, value, 1, 0);
        CHECK(won == 0 || won == -2);
        if (won == 0)
            CHECK_EQUAL(kv_delete(kv, 999), 0);
    }
    for (round = 0; round < 100; round++) {
        key = 1000000 * (number + 1) + (uint32_t)round;
        memset(value, (int)(number + (uint32_t)round), sizeof value);
        CHECK_EQUAL(kv_read(kv, key, found, sizeof found), 30 * round);
        CHECK(memcmp(value, found, 30 * (size_t)round) == 0);
        if (round % 2)
            CHECK_EQUAL(kv_delete(kv, key), 0);
    }
    kv_close(kv);
    return 0;
}
