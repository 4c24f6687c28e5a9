/* Sixteen threads: each with a descriptor of its own, all on one descriptor, and descriptors that one thread closes while
 * others use them.
 *
 * usage: threads IP PORT
 */
#include "psiskv.h"
#include "check.h"

#include <pthread.h>

#define THREADS 16
#define ROUNDS 200

static char *ip;
static int port, shared, closing[ROUNDS / 10];

static void use(int kv, uint32_t base)
{
    char value[64], found[64];
    uint32_t key;
    int round, length;

    for (round = 0; round < ROUNDS; round++) {
        key = base + (uint32_t)round % 10;
        length = snprintf(value, sizeof value, "%u in round %d", key, round);
        CHECK_EQUAL(kv_write(kv, key, value, (uint32_t)length, 1), 0);
        CHECK_EQUAL(kv_write(kv, key, value, (uint32_t)length, 0), -2);
        memset(found, 0, sizeof found);
        CHECK_EQUAL(kv_read(kv, key, found, sizeof found), length);
        CHECK(strcmp(found, value) == 0);
        CHECK_EQUAL(kv_delete(kv, key), 0);
        CHECK_EQUAL(kv_read(kv, key, found, sizeof found), -2);
        CHECK_EQUAL(kv_delete(kv, key), -1);
    }
}

static void *thread(void *argument)
{
    uint32_t number = *(uint32_t *)argument;
    char buffer[8];
    int which, own = kv_connect(ip, port), found;

    CHECK(own > 0);
    use(own, 1000 * (number + 1));
    use(shared, 1000 * (number + 1));
    kv_close(own);
    CHECK_EQUAL(kv_read(own, 1, buffer, sizeof buffer), -1);
    /* Thread 0 closes what the others read from: a value or an error, never a crash. */
    for (which = 0; which < ROUNDS / 10; which++) {
        if (number == 0) {
            kv_close(closing[which]);
        } else {
            found = kv_read(closing[which], 1, buffer, sizeof buffer);
            CHECK(found == 6 || found == -1);
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[THREADS];
    uint32_t numbers[THREADS], which;

    CHECK_EQUAL(argc, 3);
    ip = argv[1];
    port = atoi(argv[2]);
    shared = kv_connect(ip, port);
    CHECK(shared > 0);
    CHECK_EQUAL(kv_write(shared, 1, "shared", 6, 1), 0);
    for (which = 0; which < ROUNDS / 10; which++)
        CHECK((closing[which] = kv_connect(ip, port)) > 0);
    for (which = 0; which < THREADS; which++) {
        numbers[which] = which;
        CHECK_EQUAL(pthread_create(&threads[which], NULL, thread, &numbers[which]), 0);
    }
    for (which = 0; which < THREADS; which++)
        CHECK_EQUAL(pthread_join(threads[which], NULL), 0);
    kv_close(shared);
    return 0;
}
