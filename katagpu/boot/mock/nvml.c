/* Stands for libnvidia-ml.so.1 while nvidia-ctk writes a CDI specification in the boot check: it
   answers for the GPUs that the kernel's driver has taken, and needs none of them to work.

   Functions and their types: NVIDIA's public nvml.h (CUDA 12). Only what nvidia-ctk asks for in its
   mode nvml is here; go-nvml looks every other function up by name and does without. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SUCCESS 0
#define INVALID_ARGUMENT 2
#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define GPUS 32

typedef struct gpu {
	char address[20];
	unsigned minor;
	char uuid[48];
	char model[96];
} *nvmlDevice_t;

typedef struct {
	char busIdLegacy[16];
	unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
	char busId[32];
} nvmlPciInfo_t;

static struct gpu gpus[GPUS];
static unsigned count;

static int by_address(const void *one, const void *other)
{
	return strcmp(((const struct gpu *)one)->address, ((const struct gpu *)other)->address);
}

/* What the kernel's module says of a GPU: /proc/driver/nvidia/gpus/ADDRESS/information. */
static int read_gpu(const char *address, struct gpu *gpu)
{
	char path[320], line[256];
	FILE *file;

	snprintf(path, sizeof path, "/proc/driver/nvidia/gpus/%s/information", address);
	file = fopen(path, "r");
	if (file == NULL)
		return 0;
	memset(gpu, 0, sizeof *gpu);
	snprintf(gpu->address, sizeof gpu->address, "%s", address);
	while (fgets(line, sizeof line, file)) {
		sscanf(line, "Device Minor: %u", &gpu->minor);
		sscanf(line, "Model: %95[^\n]", gpu->model);
	}
	fclose(file);
	snprintf(gpu->uuid, sizeof gpu->uuid, "GPU-00000000-0000-0000-0000-%012u", gpu->minor);
	return 1;
}

int nvmlInit_v2(void)
{
	DIR *directory = opendir("/proc/driver/nvidia/gpus");
	struct dirent *entry;

	count = 0;
	if (directory == NULL)
		return 9; /* NVML_ERROR_DRIVER_NOT_LOADED */
	while ((entry = readdir(directory)) && count < GPUS)
		if (entry->d_name[0] != '.')
			count += read_gpu(entry->d_name, &gpus[count]);
	closedir(directory);
	qsort(gpus, count, sizeof gpus[0], by_address);
	return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags)
{
	(void)flags;
	return nvmlInit_v2();
}

int nvmlShutdown(void)
{
	return SUCCESS;
}

const char *nvmlErrorString(int error)
{
	(void)error;
	return "an error of the boot check's own library";
}

int nvmlSystemGetDriverVersion(char *version, unsigned length)
{
	FILE *file = fopen("/sys/module/nvidia/version", "r");

	if (file == NULL)
		return 9;
	if (fgets(version, length, file) == NULL)
		version[0] = 0;
	version[strcspn(version, "\n")] = 0;
	fclose(file);
	return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
	*version = 12040;
	return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *found)
{
	*found = count;
	return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device)
{
	if (index >= count)
		return INVALID_ARGUMENT;
	*device = &gpus[index];
	return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
	for (unsigned i = 0; i < count; i++)
		if (strcmp(gpus[i].uuid, uuid) == 0) {
			*device = &gpus[i];
			return SUCCESS;
		}
	return NOT_FOUND;
}

int nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index)
{
	*index = device - gpus;
	return SUCCESS;
}

int nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned *minor)
{
	*minor = device->minor;
	return SUCCESS;
}

int nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length)
{
	snprintf(uuid, length, "%s", device->uuid);
	return SUCCESS;
}

int nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length)
{
	snprintf(name, length, "%s", device->model);
	return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci)
{
	memset(pci, 0, sizeof *pci);
	sscanf(device->address, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device);
	snprintf(pci->busId, sizeof pci->busId, "%08X:%02X:%02X.0", pci->domain, pci->bus,
		 pci->device);
	snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "%04X:%02X:%02X.0",
		 pci->domain & 0xffff, pci->bus & 0xff, pci->device & 0xff);
	return SUCCESS;
}

int nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
	(void)device;
	*current = *pending = 0;
	return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned *most)
{
	(void)device;
	*most = 0;
	return SUCCESS;
}

int nvmlDeviceIsMigDeviceHandle(nvmlDevice_t device, unsigned *is)
{
	(void)device;
	*is = 0;
	return SUCCESS;
}
