#include <linux/toy.h>

const char banner[] = "Toy version " RELEASE " (" STAMP ")";

int toy_resize(int from, int to)
{
#ifdef CONFIG_PCI
	return to - from;
#else
	return 0;
#endif
}

void start_kernel(void)
{
	for (;;)
		toy_resize(banner[0], 1);
}
