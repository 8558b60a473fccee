/* CUDA's driver library without a driver: what zcinfer asks of it to share memory between processes.
 *
 *     cc -shared -fPIC -o libcuda.so.1 fake_cuda.c
 *
 * One card, whose memory is that of the host: an allocation is a memfd, and its handle the process and number by which another
 * process opens it. So it is gone when nobody has it mapped, as a card's is. By the environment:
 *
 *     FAKE_CUDA_MEMORY  bytes of the card, 1 GiB; each process counts its own
 *     FAKE_CUDA_FAIL    "FUNCTION=CODE,FUNCTION=CODE" of those that fail
 *     FAKE_CUDA_UUID    first byte of the card's UUID, 171
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, INVALID_HANDLE = 400 };
enum { MOST = 256 };

typedef unsigned long long ull;
typedef struct { char bytes[16]; } uuid;
typedef struct { char bytes[64]; } handle;
typedef struct { void *address; size_t bytes; int file; } memory;

static memory allocated[MOST], opened[MOST];
static int started, contexts;
static size_t taken;

static int fails(const char *function)
{
    const char *told = getenv("FAKE_CUDA_FAIL"), *found;
    size_t length = strlen(function);
    if (!told)
        return 0;
    for (found = strstr(told, function); found; found = strstr(found + 1, function))
        if (found[length] == '=' && (found == told || found[-1] == ','))
            return atoi(found + length + 1);
    return 0;
}

#define ENTER \
    do { \
        int code = fails(__func__); \
        if (code) \
            return code; \
        if (!started) \
            return NOT_INITIALIZED; \
    } while (0)

static size_t total(void)
{
    const char *told = getenv("FAKE_CUDA_MEMORY");
    return told ? (size_t)strtoull(told, NULL, 10) : (size_t)1 << 30;
}

static memory *place(memory *table, void *address)
{
    for (int i = 0; i < MOST; i++)
        if (table[i].address == address)
            return &table[i];
    return NULL;
}

int cuInit(unsigned flags)
{
    int code = fails(__func__);
    started = !code && !flags;
    return code;
}

int cuDeviceGet(int *device, int number)
{
    ENTER;
    *device = number;
    return number ? 101 : SUCCESS;
}

int cuDeviceGetUuid_v2(uuid *found, int device)
{
    ENTER;
    const char *told = getenv("FAKE_CUDA_UUID");
    memset(found, device, sizeof *found);
    found->bytes[0] = (char)(told ? atoi(told) : 171);
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    ENTER;
    *value = attribute == 125 && !device;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device)
{
    ENTER;
    *context = &started + device;
    return SUCCESS;
}

int cuCtxPushCurrent_v2(void *context)
{
    ENTER;
    __atomic_add_fetch(&contexts, 1, __ATOMIC_SEQ_CST);
    return context == &started ? SUCCESS : INVALID_VALUE;
}

int cuCtxPopCurrent_v2(void **context)
{
    ENTER;
    *context = &started;
    return __atomic_sub_fetch(&contexts, 1, __ATOMIC_SEQ_CST) < 0 ? INVALID_VALUE : SUCCESS;
}

int cuCtxSynchronize(void)
{
    ENTER;
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t *free, size_t *all)
{
    ENTER;
    *all = total();
    *free = *all - taken;
    return SUCCESS;
}

int cuMemAlloc_v2(ull *pointer, size_t bytes)
{
    ENTER;
    memory *free = place(allocated, NULL);
    if (!bytes || !free)
        return INVALID_VALUE;
    if (taken + bytes > total())
        return OUT_OF_MEMORY;
    free->file = memfd_create("fake-cuda", MFD_CLOEXEC);
    if (free->file < 0 || ftruncate(free->file, (off_t)bytes))
        return OUT_OF_MEMORY;
    free->address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, free->file, 0);
    free->bytes = bytes;
    taken += bytes;
    *pointer = (ull)(size_t)free->address;
    return SUCCESS;
}

int cuMemFree_v2(ull pointer)
{
    ENTER;
    memory *found = pointer ? place(allocated, (void *)(size_t)pointer) : NULL;
    if (!found)
        return INVALID_VALUE;
    munmap(found->address, found->bytes);
    close(found->file);
    taken -= found->bytes;
    found->address = NULL;
    return SUCCESS;
}

int cuIpcGetMemHandle(handle *made, ull pointer)
{
    ENTER;
    memory *found = pointer ? place(allocated, (void *)(size_t)pointer) : NULL;
    if (!found)
        return INVALID_VALUE;
    memset(made, 0, sizeof *made);
    snprintf(made->bytes, sizeof made->bytes, "/proc/%d/fd/%d %zu", (int)getpid(), found->file, found->bytes);
    return SUCCESS;
}

int cuIpcOpenMemHandle_v2(ull *pointer, handle given, unsigned flags)
{
    ENTER;
    char path[64];
    size_t bytes;
    memory *free = place(opened, NULL);
    if (flags != 1 || !free || sscanf(given.bytes, "%63s %zu", path, &bytes) != 2)
        return INVALID_VALUE;
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return INVALID_HANDLE;
    free->address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    free->bytes = bytes;
    close(file);
    *pointer = (ull)(size_t)free->address;
    return SUCCESS;
}

int cuIpcCloseMemHandle(ull pointer)
{
    ENTER;
    memory *found = pointer ? place(opened, (void *)(size_t)pointer) : NULL;
    if (!found)
        return INVALID_VALUE;
    munmap(found->address, found->bytes);
    found->address = NULL;
    return SUCCESS;
}

int cuGetErrorName(int code, const char **name)
{
    *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : code == INVALID_HANDLE ? "CUDA_ERROR_INVALID_HANDLE" : "CUDA_ERROR";
    return SUCCESS;
}
