/* Takes part in the storm: each thread has a descriptor of its own and finds exactly what it must, until standard input ends. A key is
 * stored once, exists then, is read, deleted once, and is gone then.
 *
 * usage: storm IP PORT NUMBER THREADS
 */
#include <pthread.h>

#include "psiskv.h"
#include "check.h"

#define THREADS_MAX 16
#define LARGE (1500 * 1000)

static char *address;
static int port, number;
static volatile int over;
static pthread_barrier_t connected;
static unsigned long rounds[THREADS_MAX];

static void fill(char *value, uint32_t length, uint32_t key)
{
    uint32_t at;

    for (at = 0; at < length; at++)
        value[at] = (char)(key * 31 + at * 7 + at / 251);
}

static void *work(void *argument)
{
    long thread = (long)argument;
    uint32_t key = 1000000u * (uint32_t)(number * THREADS_MAX + thread + 1), length;
    char *value = malloc(LARGE), *found = malloc(LARGE);
    int kv = kv_connect(address, port);

    CHECK(kv > 0);
    CHECK(value && found);
    pthread_barrier_wait(&connected);
    for (; !over; key++) {
        length = key % 100 == 99 ? LARGE : key % 700;
        fill(value, length, key);
        CHECK_EQUAL(kv_write(kv, key, value, length, 0), 0);
        CHECK_EQUAL(kv_write(kv, key, value, length, 0), -2);
        CHECK_EQUAL(kv_read(kv, key, found, LARGE), length);
        CHECK(memcmp(found, value, length) == 0);
        CHECK_EQUAL(kv_write(kv, key, value, length / 2, 1), 0);
        CHECK_EQUAL(kv_read(kv, key, found, LARGE), length / 2);
        CHECK_EQUAL(kv_delete(kv, key), 0);
        CHECK_EQUAL(kv_delete(kv, key), -1);
        CHECK_EQUAL(kv_read(kv, key, found, LARGE), -2);
        rounds[thread]++;
        usleep(500);
    }
    kv_close(kv);
    free(value);
    free(found);
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[THREADS_MAX];
    unsigned long all = 0;
    long thread, count;

    CHECK_EQUAL(argc, 5);
    address = argv[1];
    port = atoi(argv[2]);
    number = atoi(argv[3]);
    count = atoi(argv[4]);
    CHECK(count >= 1 && count <= THREADS_MAX);
    CHECK_EQUAL(pthread_barrier_init(&connected, NULL, (unsigned)count + 1), 0);
    for (thread = 0; thread < count; thread++)
        CHECK_EQUAL(pthread_create(&threads[thread], NULL, work, (void *)thread), 0);
    pthread_barrier_wait(&connected);
    puts("connected");
    fflush(stdout);
    while (getchar() != EOF)
        ;
    over = 1;
    for (thread = 0; thread < count; thread++) {
        CHECK_EQUAL(pthread_join(threads[thread], NULL), 0);
        all += rounds[thread];
    }
    printf("%lu rounds of 9 calls\n", all);
    return 0;
}
