/* Its data and its descriptor survive the death of the data server. It writes, says so, waits for a line, and goes on; as often
 * as there are lines.
 *
 * usage: survives IP PORT
 */
#include "psiskv.h"
#include "check.h"

#define KEYS 500

static char value[20000], found[20000];

static uint32_t fill(uint32_t key, int round)
{
    memset(value, 'a' + (int)((key + (uint32_t)round) % 26), sizeof value);
    return key % 50 == 0 ? sizeof value : key;
}

int main(int argc, char **argv)
{
    char line[16];
    uint32_t key, length;
    int kv, round;

    CHECK_EQUAL(argc, 3);
    kv = kv_connect(argv[1], atoi(argv[2]));
    CHECK(kv > 0);
    for (round = 0;; round++) {
        for (key = 0; key < KEYS; key++) {
            length = fill(key, round);
            CHECK_EQUAL(kv_write(kv, key, value, length, 1), 0);
        }
        puts("written");
        fflush(stdout);
        if (!fgets(line, sizeof line, stdin))
            break;
        for (key = 0; key < KEYS; key++) {
            length = fill(key, round);
            CHECK_EQUAL(kv_read(kv, key, found, sizeof found), length);
            CHECK(memcmp(found, value, length) == 0);
        }
        CHECK_EQUAL(kv_write(kv, 7, "x", 1, 0), -2);
        CHECK_EQUAL(kv_delete(kv, 7), 0);
        CHECK_EQUAL(kv_read(kv, 7, found, sizeof found), -2);
    }
    kv_close(kv);
    return 0;
}
