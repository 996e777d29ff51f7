/* An NVML without a GPU: its boards do what a script says.
 *
 * Built as libnvidia-ml.so.1 and put first in LD_LIBRARY_PATH, it is what the real nvidia-ml-py loads. The script
 * is the text file that the environment variable LLEM_SCRIPTED_NVML names; a line is a word and its value, and a
 * '#' starts a comment:
 *
 *     start 1234.5            t = 0, in seconds of CLOCK_MONOTONIC
 *     driver 580.00           what the driver calls itself
 *     call_ms 4               how long every call takes; default 0
 *     trace /tmp/trace        append every call to this file: seconds, pid, function, board, result, value
 *     device GPU-0123         a board, by UUID; the lines below are its own
 *       name Scripted
 *       tick_ms 100           the energy counter moves this often, on multiples of it since the start
 *       counter_mj 5000       the energy counter at t = 0
 *       power 0 70            from t = 0 on it draws 70 W; at least one such line, in order of time
 *       power 2.5 300         from t = 2.5 on 300 W
 *       temperature 0 35      from t = 0 on it is at 35 °C; more such lines as for power, none: it has no sensor
 *       no_power_reading 1    it tells no power
 *       old_driver 1          it knows only the older of the two calls for the temperature
 *       power_limit_w 700
 *       memory_mb 80000
 *       used_mb 0 500         from t = 0 on 500 MB of that are in use; more such lines as for power, none: 0
 *       no_memory 1           it tells nothing of its memory
 *       capability 9.0        CUDA compute capability; default 9.0
 *       persistence 1
 *       mig 1
 *       no_counter 1          it has no energy counter
 *       reset_at 3.0          at t = 3 the energy counter starts again from 0
 *       lost_at 3.0           from t = 3 on it has fallen off the bus
 *
 * The energy counter is the exact integral of the power up to the last tick. Everything is a function of the script
 * and the clock, so that several processes see the same boards. A script that is replaced (by another file of its
 * name) is read again before the next call. One that cannot be understood ends the process.
 *
 * A new function of NVML is written as those at the end: a body between ENTER and LEAVE.
 */

#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* nvml.h, as far as it is needed */
typedef int nvmlReturn_t;
enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_FUNCTION_NOT_FOUND = 13,
    NVML_ERROR_GPU_IS_LOST = 15,
};
typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;
typedef struct {
    unsigned int version, sensor;
    int temperature;
} nvmlTemperature_t;

enum { BOARDS = 16, SEGMENTS = 64, TEXT = 1024 };

typedef struct {
    double from_s, value;
} Segment;

typedef struct {
    Segment segments[SEGMENTS];
    int n;
} Course;

typedef struct Board {
    char uuid[TEXT], name[TEXT];
    double tick_ms, counter_mj, power_limit_w, memory_mb, reset_at, lost_at;
    double persistence, mig, no_counter, no_power_reading, old_driver, no_memory, capability;
    Course watts, celsius, used_mb;
} Board;
typedef Board *nvmlDevice_t;

static struct {
    double start, call_ms;
    char driver[TEXT], trace[TEXT];
    Board boards[BOARDS];
    int n_boards;
} script;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stat read_from;
static int users;    /* of nvmlInit, less nvmlShutdown */
static double asked; /* when the call under way was asked, in seconds of CLOCK_MONOTONIC: it answers for then */

static void give_up(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("scripted NVML: ", stderr);
    vfprintf(stderr, format, arguments);
    fputs("\n", stderr);
    va_end(arguments);
    abort();
}

static double clock_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* ---- the script ---- */

static void add_segment(Course *course, const char *word, const char *value) {
    if (course->n == SEGMENTS) give_up("more than %d lines of %s", SEGMENTS, word);
    Segment *segment = &course->segments[course->n++];
    if (sscanf(value, "%lf %lf", &segment->from_s, &segment->value) != 2) give_up("%s %s", word, value);
}

static void read_line(const char *word, const char *value) {
    Board *board = script.n_boards ? &script.boards[script.n_boards - 1] : NULL;
    double number = strtod(value, NULL);
    if (!strcmp(word, "start")) {
        script.start = number;
    } else if (!strcmp(word, "driver")) {
        snprintf(script.driver, TEXT, "%s", value);
    } else if (!strcmp(word, "call_ms")) {
        script.call_ms = number;
    } else if (!strcmp(word, "trace")) {
        snprintf(script.trace, TEXT, "%s", value);
    } else if (!strcmp(word, "device")) {
        if (script.n_boards == BOARDS) give_up("more than %d devices", BOARDS);
        board = &script.boards[script.n_boards++];
        memset(board, 0, sizeof *board);
        snprintf(board->uuid, TEXT, "%s", value);
        snprintf(board->name, TEXT, "Scripted");
        board->tick_ms = 20;
        board->capability = 9.0;
        board->reset_at = board->lost_at = INFINITY;
    } else if (!board) {
        give_up("%s before any device", word);
    } else if (!strcmp(word, "name")) {
        snprintf(board->name, TEXT, "%s", value);
    } else if (!strcmp(word, "power")) {
        add_segment(&board->watts, word, value);
    } else if (!strcmp(word, "temperature")) {
        add_segment(&board->celsius, word, value);
    } else if (!strcmp(word, "used_mb")) {
        add_segment(&board->used_mb, word, value);
    } else {
        const struct {
            const char *word;
            double *field;
        } numbers[] = {
            {"tick_ms", &board->tick_ms},         {"counter_mj", &board->counter_mj},
            {"reset_at", &board->reset_at},       {"lost_at", &board->lost_at},
            {"memory_mb", &board->memory_mb},     {"power_limit_w", &board->power_limit_w},
            {"persistence", &board->persistence}, {"mig", &board->mig},
            {"no_counter", &board->no_counter},   {"no_power_reading", &board->no_power_reading},
            {"old_driver", &board->old_driver},   {"no_memory", &board->no_memory},
            {"capability", &board->capability},
        };
        for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
            if (!strcmp(word, numbers[i].word)) {
                *numbers[i].field = number;
                return;
            }
        }
        give_up("what is %s?", word);
    }
}

/* Read the script, unless it is the file that was read last. */
static void read_script(void) {
    const char *path = getenv("LLEM_SCRIPTED_NVML");
    struct stat found;
    if (!path || stat(path, &found)) give_up("no script %s", path ? path : "is named by LLEM_SCRIPTED_NVML");
    if (found.st_ino == read_from.st_ino && found.st_mtim.tv_sec == read_from.st_mtim.tv_sec &&
        found.st_mtim.tv_nsec == read_from.st_mtim.tv_nsec)
        return;
    FILE *file = fopen(path, "r");
    if (!file) give_up("cannot read %s", path);
    fstat(fileno(file), &read_from);
    memset(&script, 0, sizeof script);
    char line[TEXT + 64], word[32], value[TEXT];
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "#\n")] = '\0';
        int words = sscanf(line, "%31s %1023[^\n]", word, value);
        if (words == 1) give_up("%s what?", word);
        if (words == 2) read_line(word, value);
    }
    fclose(file);
}

/* ---- physics ---- */

/* Energy in J that a board drew from t = a to t = b. */
static double energy_j(const Board *board, double a, double b) {
    double sum = 0;
    const Course *course = &board->watts;
    for (int i = 0; i < course->n; i++) {
        double from = course->segments[i].from_s;
        double to = i + 1 < course->n ? course->segments[i + 1].from_s : INFINITY;
        from = from > a ? from : a;
        to = to < b ? to : b;
        if (to > from) sum += (to - from) * course->segments[i].value;
    }
    return sum;
}

static unsigned long long counter_mj(const Board *board, double t) {
    double tick_s = board->tick_ms / 1000;
    double ticked = floor(t / tick_s) * tick_s;
    if (t < board->reset_at) return (unsigned long long)(board->counter_mj + 1000 * energy_j(board, 0, ticked));
    return (unsigned long long)(1000 * energy_j(board, board->reset_at, ticked));
}

/* What a course is at, at t; whether it has begun. */
static int at(const Course *course, double t, double *value) {
    int begun = 0;
    for (int i = 0; i < course->n && course->segments[i].from_s <= t; i++) {
        *value = course->segments[i].value;
        begun = 1;
    }
    return begun;
}

/* ---- calls ---- */

static void trace(const char *function, nvmlDevice_t device, nvmlReturn_t result, unsigned long long value) {
    if (!*script.trace) return;
    FILE *file = fopen(script.trace, "a");
    if (!file) give_up("cannot write %s", script.trace);
    fprintf(file, "%.9f %d %s %s %d %llu\n", asked, (int)getpid(), function, device ? device->uuid : "-", result,
            value);
    fclose(file);
}

static void call(void) {
    pthread_mutex_lock(&lock);
    read_script();
    struct timespec pause = {(time_t)(script.call_ms / 1000), (long)(fmod(script.call_ms, 1000) * 1e6)};
    nanosleep(&pause, NULL);
    asked = clock_s();
}

/* Whether a board can answer at all. */
static nvmlReturn_t answering(nvmlDevice_t device) {
    if (!users) return NVML_ERROR_UNINITIALIZED;
    if (device < script.boards || device >= script.boards + script.n_boards) return NVML_ERROR_INVALID_ARGUMENT;
    return asked - script.start < device->lost_at ? NVML_SUCCESS : NVML_ERROR_GPU_IS_LOST;
}

/* What stands between is done for a board that answers; it may change result, and value is traced. */
#define ENTER(device)                                                                                                 \
    call();                                                                                                           \
    nvmlDevice_t entered = (device);                                                                                  \
    unsigned long long value = 0;                                                                                     \
    nvmlReturn_t result = answering(entered);                                                                         \
    if (result == NVML_SUCCESS) {
#define LEAVE                                                                                                         \
    }                                                                                                                 \
    trace(__func__, result == NVML_ERROR_INVALID_ARGUMENT ? NULL : entered, result, value);                           \
    pthread_mutex_unlock(&lock);                                                                                      \
    return result;

static nvmlReturn_t put(char *buffer, unsigned int length, const char *text) {
    return (unsigned int)snprintf(buffer, length, "%s", text) < length ? NVML_SUCCESS : NVML_ERROR_INSUFFICIENT_SIZE;
}

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    call();
    users++;
    trace("nvmlInit", NULL, NVML_SUCCESS, (unsigned long long)users);
    pthread_mutex_unlock(&lock);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlInit_v2(void) {
    return nvmlInitWithFlags(0);
}

nvmlReturn_t nvmlShutdown(void) {
    call();
    nvmlReturn_t result = users ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
    if (users) users--;
    trace("nvmlShutdown", NULL, result, (unsigned long long)users);
    pthread_mutex_unlock(&lock);
    return result;
}

const char *nvmlErrorString(nvmlReturn_t result) {
    switch (result) {
    case NVML_SUCCESS: return "Success";
    case NVML_ERROR_UNINITIALIZED: return "Uninitialized";
    case NVML_ERROR_INVALID_ARGUMENT: return "Invalid Argument";
    case NVML_ERROR_NOT_SUPPORTED: return "Not Supported";
    case NVML_ERROR_NOT_FOUND: return "Not Found";
    case NVML_ERROR_INSUFFICIENT_SIZE: return "Insufficient Size";
    case NVML_ERROR_FUNCTION_NOT_FOUND: return "Function Not Found";
    case NVML_ERROR_GPU_IS_LOST: return "GPU is lost";
    default: return "Unknown Error";
    }
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    call();
    nvmlReturn_t result = users ? put(version, length, script.driver) : NVML_ERROR_UNINITIALIZED;
    trace(__func__, NULL, result, 0);
    pthread_mutex_unlock(&lock);
    return result;
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    call();
    nvmlReturn_t result = users ? NVML_ERROR_NOT_FOUND : NVML_ERROR_UNINITIALIZED;
    for (int i = 0; users && i < script.n_boards; i++) {
        if (!strcmp(script.boards[i].uuid, uuid)) {
            *device = &script.boards[i]; /* good for the next script too: boards keep their places */
            result = answering(*device);
        }
    }
    trace(__func__, NULL, result, 0);
    pthread_mutex_unlock(&lock);
    return result;
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) {
    call();
    *count = (unsigned int)script.n_boards;
    nvmlReturn_t result = users ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
    trace(__func__, NULL, result, *count);
    pthread_mutex_unlock(&lock);
    return result;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device) {
    call();
    *device = &script.boards[index < BOARDS ? index : 0];
    nvmlReturn_t result = index < (unsigned int)script.n_boards ? answering(*device) : NVML_ERROR_INVALID_ARGUMENT;
    trace(__func__, NULL, result, index);
    pthread_mutex_unlock(&lock);
    return result;
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length) {
    ENTER(device)
    result = put(uuid, length, device->uuid);
    LEAVE
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned int *milliwatts) {
    ENTER(device)
    double watts = 0;
    if (device->no_power_reading || !at(&device->watts, asked - script.start, &watts))
        result = NVML_ERROR_NOT_SUPPORTED;
    else
        *milliwatts = value = (unsigned int)(watts * 1000);
    LEAVE
}

nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned int sensor, unsigned int *celsius) {
    ENTER(device)
    double degrees = 0;
    if (sensor != 0)
        result = NVML_ERROR_INVALID_ARGUMENT;
    else if (!at(&device->celsius, asked - script.start, &degrees))
        result = NVML_ERROR_NOT_SUPPORTED;
    else
        *celsius = value = (unsigned int)degrees;
    LEAVE
}

nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, nvmlTemperature_t *temperature) {
    ENTER(device)
    double degrees = 0;
    if (device->old_driver)
        result = NVML_ERROR_FUNCTION_NOT_FOUND;
    else if (temperature->version != 0x100000C || temperature->sensor != 0)
        result = NVML_ERROR_INVALID_ARGUMENT;
    else if (!at(&device->celsius, asked - script.start, &degrees))
        result = NVML_ERROR_NOT_SUPPORTED;
    else
        temperature->temperature = (int)(value = (unsigned long long)degrees);
    LEAVE
}

nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *millijoules) {
    ENTER(device)
    if (device->no_counter)
        result = NVML_ERROR_NOT_SUPPORTED;
    else
        *millijoules = value = counter_mj(device, asked - script.start);
    LEAVE
}

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned int *current, unsigned int *pending) {
    ENTER(device)
    *current = *pending = device->mig != 0;
    LEAVE
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned int length) {
    ENTER(device)
    result = put(name, length, device->name);
    LEAVE
}

nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned int *milliwatts) {
    ENTER(device)
    *milliwatts = (unsigned int)(device->power_limit_w * 1000);
    LEAVE
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    ENTER(device)
    double used_mb = 0;
    at(&device->used_mb, asked - script.start, &used_mb);
    if (device->no_memory) {
        result = NVML_ERROR_NOT_SUPPORTED;
    } else {
        memory->total = (unsigned long long)(device->memory_mb * 1e6);
        memory->used = value = (unsigned long long)(used_mb * 1e6);
        memory->free = memory->total - memory->used;
    }
    LEAVE
}

nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor) {
    ENTER(device)
    *major = (int)device->capability;
    *minor = (int)lround(10 * (device->capability - *major));
    LEAVE
}

nvmlReturn_t nvmlDeviceGetPersistenceMode(nvmlDevice_t device, int *mode) {
    ENTER(device)
    *mode = device->persistence != 0;
    LEAVE
}
