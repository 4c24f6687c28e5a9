/* A store that does not come back: the call returns -1 when the patience is over, and the same descriptor works when the store is there
 * again. It says "up", waits for a line, tries, says how long that took in milliseconds, waits for a line, and goes on.
 *
 * usage: patience IP PORT
 */
#include "psiskv.h"
#include "check.h"

#include <time.h>

static long now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void wait_for_line(void)
{
    char line[16];

    fflush(stdout);
    CHECK(fgets(line, sizeof line, stdin) != NULL);
}

int main(int argc, char **argv)
{
    char found[8];
    long begun;
    int kv;

    CHECK_EQUAL(argc, 3);
    kv = kv_connect(argv[1], atoi(argv[2]));
    CHECK(kv > 0);
    CHECK_EQUAL(kv_write(kv, 1, "one", 3, 0), 0);
    puts("up");
    wait_for_line();
    begun = now_ms();
    CHECK_EQUAL(kv_write(kv, 2, "two", 3, 0), -1);
    printf("%ld\n", now_ms() - begun);
    CHECK_EQUAL(kv_read(kv, 1, found, sizeof found), -1);
    CHECK_EQUAL(kv_delete(kv, 1), -1);
    puts("gave up");
    wait_for_line();
    CHECK_EQUAL(kv_read(kv, 1, found, sizeof found), 3);
    CHECK_EQUAL(kv_write(kv, 1, "one", 3, 0), -2);
    CHECK_EQUAL(kv_write(kv, 2, "two", 3, 0), 0);
    CHECK_EQUAL(kv_delete(kv, 1), 0);
    kv_close(kv);
    return 0;
}
