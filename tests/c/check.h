/* CHECK: the condition holds, or the program says which did not and ends with status 1. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

#define CHECK_EQUAL(found, expected)                                                      \
    do {                                                                                  \
        long found_ = (long)(found), expected_ = (long)(expected);                        \
        if (found_ != expected_) {                                                        \
            fprintf(stderr, "%s:%d: %s is %ld, not %ld\n", __FILE__, __LINE__, #found,    \
                    found_, expected_);                                                   \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

#endif
