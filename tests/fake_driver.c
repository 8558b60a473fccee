/* A driver library without a driver: what of NVML zcinfer asks for, with figures that tests know.
 *
 *     cc -shared -fPIC -o libnvidia-ml.so.1 fake_driver.c
 *
 * With -DOLDER it is an older driver, without functions that came later: the newer names of temperature and clock reasons.
 * The real pynvml loads it in a process that is started with its directory in LD_LIBRARY_PATH. Two cards: 0 is whole, 1 is
 * in MIG mode, with instances at places 0 and 2. By the environment:
 *
 *     FAKE_NVML_CARDS  number of cards, 2
 *     FAKE_NVML_MIG    card in MIG mode, 1; empty: none
 *     FAKE_NVML_CPUS   CPUs near each card, as hexadecimal masks, "1,2"
 *     FAKE_NVML_MODELS names of the cards, "H100,H100"
 *     FAKE_NVML_FAIL   what fails: "FUNCTION=CODE,FUNCTION@CARD=CODE", for instances too; or "/PATH" of a file that says so,
 *                      read at each call, so that a card can be lost while a program runs
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MOST_CARDS = 8, MOST_INSTANCES = 7 };

typedef unsigned int uint;
typedef unsigned long long ull;
typedef struct { uint card; int instance; } handle; /* instance -1: the card itself */
typedef struct { uint pid; ull bytes; uint gpu_instance, compute_instance; } process;
typedef struct { uint pid; ull at; uint multiprocessors, memory, encoder, decoder; } sample;
typedef struct {
    char legacy_id[16];
    uint domain, bus, device, id, subsystem;
    char id_text[32];
} pci;

static handle cards[MOST_CARDS], instances[MOST_CARDS][MOST_INSTANCES];
static int started;

static const char *setting(const char *name, const char *otherwise)
{
    const char *found = getenv(name);
    return found ? found : otherwise;
}

/* The part of a list with commas, at a place; the last one where there are fewer. */
static void part(const char *list, uint place, char *out, size_t size)
{
    const char *end;
    while (place-- && strchr(list, ','))
        list = strchr(list, ',') + 1;
    end = strchr(list, ',');
    snprintf(out, size, "%.*s", (int)(end ? end - list : (long)strlen(list)), list);
}

static uint count(void)
{
    uint number = (uint)atoi(setting("FAKE_NVML_CARDS", "2"));
    return number < MOST_CARDS ? number : MOST_CARDS;
}

static int is_partitioned(uint card)
{
    const char *text = setting("FAKE_NVML_MIG", "1");
    return *text && (uint)atoi(text) == card;
}

/* What a function answers by FAKE_NVML_FAIL, for a card, or -1 where it is asked of none. */
static int failure(const char *function, int card)
{
    static char text[4096];
    const char *entry = setting("FAKE_NVML_FAIL", "");
    char with_card[128];
    if (*entry == '/') {
        FILE *file = fopen(entry, "r");
        size_t size = file ? fread(text, 1, sizeof text - 1, file) : 0;
        text[size] = 0;
        if (file)
            fclose(file);
        entry = text;
    }
    snprintf(with_card, sizeof with_card, "%s@%d", function, card);
    while (*entry) {
        size_t name = strcspn(entry, "=,\n");
        if (entry[name] == '='
            && ((strlen(function) == name && !strncmp(entry, function, name))
                || (strlen(with_card) == name && !strncmp(entry, with_card, name))))
            return atoi(entry + name + 1);
        entry += strcspn(entry, ",\n");
        entry += strspn(entry, ",\n");
    }
    return SUCCESS;
}

#define ASK(card)                                         \
    do {                                                  \
        int fails = failure(__func__, (int)(card));       \
        if (fails)                                        \
            return fails;                                 \
        if (!started)                                     \
            return UNINITIALIZED;                         \
    } while (0)
#define OF_CARD(h)                                        \
    do {                                                  \
        ASK((h)->card);                                   \
        if ((h)->instance >= 0)                           \
            return NOT_SUPPORTED;                         \
    } while (0)

int nvmlInitWithFlags(uint flags)
{
    int fails = failure(__func__, -1);
    (void)flags;
    if (fails)
        return fails;
    for (uint card = 0; card < MOST_CARDS; card++) {
        cards[card] = (handle){card, -1};
        for (int place = 0; place < MOST_INSTANCES; place++)
            instances[card][place] = (handle){card, place};
    }
    started++;
    return SUCCESS;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void)
{
    if (!started)
        return UNINITIALIZED;
    started--;
    return SUCCESS;
}

const char *nvmlErrorString(int code)
{
    switch (code) {
    case NOT_SUPPORTED: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case 9: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *text, uint size)
{
    ASK(-1);
    snprintf(text, size, "600.00");
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(uint *number)
{
    ASK(-1);
    *number = count();
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(uint index, handle **found)
{
    ASK(index);
    if (index >= count())
        return INVALID_ARGUMENT;
    *found = &cards[index];
    return SUCCESS;
}

static void uuid_of(const handle *h, char *text, size_t size)
{
    uint byte = 0xa0 + 0x11 * h->card;
    if (h->instance < 0)
        snprintf(text, size, "GPU-%02x%02x%02x%02x-0000-0000-0000-%012d", byte, byte, byte, byte, 0);
    else
        snprintf(text, size, "MIG-%02x%02x%02x%02x-0000-0000-0000-%012d", byte, byte, byte, byte, h->instance);
}

static int is_there(const handle *h)
{
    return h->instance < 0 || (is_partitioned(h->card) && (h->instance == 0 || h->instance == 2));
}

int nvmlDeviceGetHandleByUUID(const char *uuid, handle **found)
{
    char text[96];
    ASK(-1);
    for (uint card = 0; card < count(); card++)
        for (int place = -1; place < MOST_INSTANCES; place++) {
            handle *h = place < 0 ? &cards[card] : &instances[card][place];
            uuid_of(h, text, sizeof text);
            if (is_there(h) && !strcmp(text, uuid)) {
                *found = h;
                return failure(__func__, (int)card);
            }
        }
    return NOT_FOUND;
}

int nvmlDeviceGetIndex(const handle *h, uint *index)
{
    ASK(h->card);
    *index = h->instance < 0 ? h->card : (uint)h->instance;
    return SUCCESS;
}

int nvmlDeviceGetUUID(const handle *h, char *text, uint size)
{
    ASK(h->card);
    uuid_of(h, text, size);
    return SUCCESS;
}

int nvmlDeviceGetName(const handle *h, char *text, uint size)
{
    char model[64];
    ASK(h->card);
    part(setting("FAKE_NVML_MODELS", "H100"), h->card, model, sizeof model);
    snprintf(text, size, "NVIDIA %s%s", model, h->instance < 0 ? "" : " MIG 1g.10gb");
    return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(const handle *h, pci *out)
{
    OF_CARD(h);
    memset(out, 0, sizeof *out);
    out->bus = 0x10 * (h->card + 1);
    snprintf(out->id_text, sizeof out->id_text, "00000000:%02X:00.0", out->bus);
    return SUCCESS;
}

int nvmlDeviceGetCpuAffinity(const handle *h, uint words, unsigned long *set)
{
    char mask[32];
    OF_CARD(h);
    memset(set, 0, words * sizeof *set);
    part(setting("FAKE_NVML_CPUS", "1,2"), h->card, mask, sizeof mask);
    if (words)
        set[0] = strtoul(mask, NULL, 16);
    return SUCCESS;
}

/* Instances */

int nvmlDeviceGetMigMode(const handle *h, uint *now, uint *pending)
{
    OF_CARD(h);
    *now = *pending = (uint)is_partitioned(h->card);
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(const handle *h, uint *number)
{
    OF_CARD(h);
    *number = MOST_INSTANCES;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(const handle *h, uint place, handle **found)
{
    OF_CARD(h);
    if (place >= MOST_INSTANCES)
        return INVALID_ARGUMENT;
    if (!is_there(&instances[h->card][place]))
        return NOT_FOUND;
    *found = &instances[h->card][place];
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(const handle *h, handle **found)
{
    ASK(h->card);
    if (h->instance < 0)
        return INVALID_ARGUMENT;
    *found = &cards[h->card];
    return SUCCESS;
}

int nvmlDeviceIsMigDeviceHandle(const handle *h, uint *is)
{
    ASK(h->card);
    *is = h->instance >= 0;
    return SUCCESS;
}

int nvmlDeviceGetGpuInstanceId(const handle *h, uint *id)
{
    ASK(h->card);
    if (h->instance < 0)
        return NOT_SUPPORTED;
    *id = (uint)h->instance + 7;
    return SUCCESS;
}

int nvmlDeviceGetComputeInstanceId(const handle *h, uint *id)
{
    ASK(h->card);
    if (h->instance < 0)
        return NOT_SUPPORTED;
    *id = 0;
    return SUCCESS;
}

/* Figures: of card 0 first, and of each next one a little more */

static ull total(const handle *h) { return h->instance < 0 ? 80ull << 30 : 10ull << 30; }
static ull used(const handle *h) { return (ull)(h->card + 1) << 30; }

int nvmlDeviceGetMemoryInfo(const handle *h, ull *out) /* total, free, used */
{
    ASK(h->card);
    out[0] = total(h);
    out[1] = total(h) - used(h);
    out[2] = used(h);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(const handle *h, ull *out) /* version, total, reserved, free, used */
{
    ASK(h->card);
    out[1] = total(h);
    out[2] = 0;
    out[3] = total(h) - used(h);
    out[4] = used(h);
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(const handle *h, uint *out) /* gpu, memory */
{
    OF_CARD(h);
    if (is_partitioned(h->card))
        return NOT_SUPPORTED;
    out[0] = 50 + h->card;
    out[1] = 20 + h->card;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(const handle *h, uint sensor, uint *celsius)
{
    (void)sensor;
    OF_CARD(h);
    *celsius = 60 + h->card;
    return SUCCESS;
}

#ifndef OLDER
int nvmlDeviceGetTemperatureV(const handle *h, uint *out) /* version, sensor, celsius */
{
    OF_CARD(h);
    out[2] = 60 + h->card;
    return SUCCESS;
}
#endif

int nvmlDeviceGetPowerUsage(const handle *h, uint *milliwatts)
{
    OF_CARD(h);
    *milliwatts = 300000 + 1000 * h->card;
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(const handle *h, uint *milliwatts)
{
    OF_CARD(h);
    *milliwatts = 700000;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(const handle *h, uint kind, uint *megahertz)
{
    OF_CARD(h);
    *megahertz = 1500 + kind;
    return SUCCESS;
}

int nvmlDeviceGetMaxClockInfo(const handle *h, uint kind, uint *megahertz)
{
    OF_CARD(h);
    *megahertz = 1980 + kind;
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(const handle *h, ull *reasons)
{
    OF_CARD(h);
    *reasons = h->card == 0 ? 0x1 | 0x4 | 0x20 : 0x1; /* idle, power cap, temperature; idle */
    return SUCCESS;
}

#ifndef OLDER
int nvmlDeviceGetCurrentClocksEventReasons(const handle *h, ull *reasons)
{
    OF_CARD(h);
    return nvmlDeviceGetCurrentClocksThrottleReasons(h, reasons);
}
#endif

/* Another's process on each; on card 0 the one that asks, too */
int nvmlDeviceGetComputeRunningProcesses_v3(const handle *h, uint *number, process *out)
{
    uint there = h->card == 0 ? 2 : 1, room = *number;
    ASK(h->card);
    *number = there;
    if (room < there)
        return INSUFFICIENT_SIZE;
    out[0] = (process){1, used(h), 0xffffffff, 0xffffffff};
    if (there > 1)
        out[1] = (process){(uint)getpid(), 1234567890, 0xffffffff, 0xffffffff};
    return SUCCESS;
}

/* Samples of both, once a program: nothing ran since */
int nvmlDeviceGetProcessUtilization(const handle *h, sample *out, uint *number, ull since)
{
    static int told;
    uint own = (uint)getpid(), room = *number;
    ASK(h->card);
    if (told)
        return NOT_FOUND;
    *number = 3;
    if (room < 3)
        return INSUFFICIENT_SIZE;
    out[0] = (sample){own, since + 1, 30, 0, 0, 0};
    out[1] = (sample){own, since + 2, 50, 0, 0, 0};
    out[2] = (sample){1, since + 3, 99, 0, 0, 0};
    told = 1;
    return SUCCESS;
}

int nvmlDeviceGetMPSComputeRunningProcesses_v3(const handle *h, uint *number, process *out)
{
    (void)out;
    ASK(h->card);
    *number = 0;
    return SUCCESS;
}
