/* An older program: it includes nothing but psiskv.h and relies on what that brings with it. */
#include "psiskv.h"

int main(int argc, char **argv)
{
    uint32_t key = 35;
    char *value = malloc(100), stored[] = "stored by C";
    int kv = kv_connect(argv[1], atoi(argv[2]));

    if (argc != 3 || kv <= 0)
        return 1;
    if (kv_write(kv, key, stored, strlen(stored) + 1, 1) != 0)
        return 2;
    memset(value, 0, 100);
    usleep(1);
    if (kv_read(kv, key, value, 100) != (int)sizeof stored || strcmp(value, stored) != 0)
        return 3;
    kv_close(kv);
    free(value);
    return 0;
}
