/*
 * Stores, reads and removes a value.
 *
 *     cc store.c -lpsiskv -o store && ./store 127.0.0.1 9999
 */
#include <stdio.h>

#include "psiskv.h"

int main(int argc, char **argv)
{
	char text[] = "kept while the data server is killed";
	char buffer[64];
	int store, length;

	if (argc != 3) {
		fprintf(stderr, "usage: %s HOST PORT\n", argv[0]);
		return 64;
	}
	store = kv_connect(argv[1], atoi(argv[2]));
	if (store < 0) {
		fprintf(stderr, "no store on %s port %s\n", argv[1], argv[2]);
		return 1;
	}
	if (kv_write(store, 35, text, sizeof text, 1) != 0) {
		fprintf(stderr, "could not store the text\n");
		return 1;
	}
	/* A second write without overwriting is refused. */
	if (kv_write(store, 35, text, sizeof text, 0) != -2)
		return 1;
	length = kv_read(store, 35, buffer, sizeof buffer);
	if (length < 0 || (size_t)length > sizeof buffer)
		return 1;
	printf("35 is \"%s\", %d bytes\n", buffer, length);
	if (kv_delete(store, 35) != 0)
		return 1;
	printf("deleted; reading it now gives %d\n", kv_read(store, 35, buffer, sizeof buffer));
	kv_close(store);
	return 0;
}
