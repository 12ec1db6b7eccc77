/* Opens each library that is named, as programs do at run time, and says what comes of it: one line
   "NAME ok PATH" or "NAME failed REASON". All symbols are bound at once. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>

int main(int argc, char **argv)
{
	int failed = 0;

	for (int i = 1; i < argc; i++) {
		struct link_map *map;
		void *handle = dlopen(argv[i], RTLD_NOW | RTLD_LOCAL);

		if (handle == NULL) {
			printf("%s failed %s\n", argv[i], dlerror());
			failed = 1;
		} else if (dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0) {
			printf("%s ok %s\n", argv[i], map->l_name);
		}
		fflush(stdout);
	}
	return failed;
}
