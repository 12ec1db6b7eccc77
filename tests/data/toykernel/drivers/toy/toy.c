#include <linux/toy.h>

const char vermagic[] __attribute__((section(".modinfo"))) = "vermagic=" RELEASE " SMP ";

int toy_probe(void)
{
	return toy_resize(1, 2);
}
