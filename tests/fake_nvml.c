/* A driver without cards, for the real nvidia-ml-py: three cards, one divided (MIG), one that this user may not read.
   Functions that older drivers have not are left out: the newer names of temperature and clock reasons. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK, NOT_SUPPORTED = 3, NO_PERMISSION = 4, INVALID = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, LOST = 15 };
enum { PLAIN, DIVIDED, FORBIDDEN, INSTANCE, CARDS = 3 };
typedef int *device;
static int cards[] = { PLAIN, DIVIDED, FORBIDDEN, INSTANCE };

int nvmlInitWithFlags(unsigned flags) { char *code = getenv("FAKE_NVML_INIT"); return code ? atoi(code) : OK; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = CARDS; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *found) {
  if (index >= CARDS) return INVALID;
  *found = &cards[index];
  return OK;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device *found) {
  if (!strcmp(uuid, "GPU-plain")) *found = &cards[PLAIN];
  else if (!strcmp(uuid, "MIG-instance")) *found = &cards[INSTANCE];
  else return NOT_FOUND;
  return OK;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device one, device *whole) { *whole = &cards[DIVIDED]; return OK; }
int nvmlDeviceGetMigMode(device one, unsigned *now, unsigned *then) {
  if (*one == FORBIDDEN) return NOT_SUPPORTED;
  *now = *then = *one != PLAIN;
  return OK;
}
int nvmlDeviceGetName(device one, char *name, unsigned length) { strncpy(name, "Fake A", length); return OK; }
int nvmlDeviceGetUUID(device one, char *uuid, unsigned length) {
  const char *uuids[] = { "GPU-plain", "GPU-divided", "GPU-forbidden", "MIG-instance" };
  strncpy(uuid, uuids[*one], length);
  return OK;
}
int nvmlDeviceGetMemoryInfo(device one, unsigned long long *memory) {
  memory[0] = *one == INSTANCE ? 10000000000ULL : 80000000000ULL;
  memory[2] = 2000000000ULL;
  memory[1] = memory[0] - memory[2];
  return OK;
}
int nvmlDeviceGetUtilizationRates(device one, unsigned *rates) {
  if (*one == DIVIDED || *one == INSTANCE) return NOT_SUPPORTED;
  rates[0] = 73;
  rates[1] = 41;
  return OK;
}
int nvmlDeviceGetTemperature(device one, unsigned sensor, unsigned *celsius) {
  if (*one == INSTANCE) return INVALID;
  *celsius = 61;
  return OK;
}
int nvmlDeviceGetPowerUsage(device one, unsigned *milliwatts) {
  if (*one == FORBIDDEN) return NO_PERMISSION;
  *milliwatts = 312500;
  return OK;
}
int nvmlDeviceGetEnforcedPowerLimit(device one, unsigned *milliwatts) { *milliwatts = 700000; return OK; }
int nvmlDeviceGetClockInfo(device one, unsigned type, unsigned *mhz) {
  if (*one == FORBIDDEN) return LOST;
  *mhz = type == 1 ? 1980 : 2619;
  return OK;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(device one, unsigned long long *reasons) {
  *reasons = 0x1 | 0x4 | 0x20; /* idle, power, temperature */
  return OK;
}
struct process { unsigned pid; unsigned long long memory; unsigned instance, compute; };
int nvmlDeviceGetComputeRunningProcesses_v3(device one, unsigned *count, struct process *found) {
  if (*one != PLAIN) { *count = 0; return OK; }
  if (*count < 1) { *count = 1; return INSUFFICIENT_SIZE; }
  *count = 1;
  found[0] = (struct process){ getpid(), 1234567890ULL, 0, 0 };
  return OK;
}
struct sample { unsigned pid; unsigned long long at; unsigned sm, memory, encoder, decoder; };
int nvmlDeviceGetProcessUtilization(device one, struct sample *found, unsigned *count, unsigned long long since) {
  static int asked;
  if (asked++ > 1) return NOT_FOUND; /* nothing ran since */
  if (*count < 3) { *count = 3; return INSUFFICIENT_SIZE; }
  *count = 3;
  found[0] = (struct sample){ getpid(), since + 1, 30, 0, 0, 0 };
  found[1] = (struct sample){ getpid(), since + 2, 50, 0, 0, 0 };
  found[2] = (struct sample){ 1, since + 3, 99, 0, 0, 0 };
  return OK;
}
