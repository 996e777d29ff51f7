/* An NVML without a GPU: its GPUs follow a script.
 *
 * Built as libnvidia-ml.so.1 and put first in LD_LIBRARY_PATH, it is what the real nvidia-ml-py loads. The script
 * is the text file that the environment variable LLEM_SCRIPTED_NVML names; a line is a word and its value, and a
 * '#' starts a comment:
 *
 *     start 1234.5            t = 0, in seconds of CLOCK_MONOTONIC
 *     driver 580.00           version of the driver
 *     call_ms 4               how long every call takes; default 0
 *     takes nvmlInit 20       how long calls of this function take instead, in ms
 *     fail nvmlInit 9         calls of this function give this nvmlReturn_t
 *     trace /tmp/trace        append every call to this file: seconds, pid, function, board, result, value
 *     device GPU-0123         a board, by UUID; the lines below are its own
 *       name Scripted
 *       tick_ms 100           the energy counter moves this often, on multiples of it since the start
 *       phase_ms 30           and this much later than that
 *       counter_mj 5000       the energy counter at t = 0
 *       counter_gain 1.1      it counts so much for each joule; default 1
 *       power 0 70            from t = 0 on it draws 70 W; at least one such line, in order of time
 *       power 2.5 300         from t = 2.5 on 300 W
 *       power 4 700 ramp      up to t = 4 it went straight from there to 700 W
 *       follows 5 /tmp/batch  beside its first power it draws so many W for each request in a server's batch, whose size the file has:
 *                             {"time": seconds of CLOCK_MONOTONIC, "batch": requests}, one a line, at each change
 *       module_power 0 500    from t = 0 on its module draws 500 W; likewise, none: the driver reads no module's power
 *       counts_module 1       the energy counter is that of the module
 *       temperature 0 35      from t = 0 on it is at 35 °C; more such lines as for power, none: it has no sensor
 *       sm_clock 0 1980       MHz; likewise
 *       memory_clock 0 2619   MHz; likewise
 *       throttle power 0 0.5  from t = 0 on power holds its clocks down half of the time; likewise for each reason:
 *                             power thermal sync_boost board_limit low_utilization reliability sw_thermal hw_thermal
 *                             hw_power_brake
 *       fail nvmlDeviceGetPowerUsage 3 from 2.5
 *                             from t = 2.5 on (default: ever) this function gives this nvmlReturn_t for this board
 *       fail 186 3            likewise a field value
 *       no_power_reading 1    it reports no power
 *       averages 1            nvmlDeviceGetPowerUsage is the mean of the last second
 *       old_driver 1          it knows only the older of the two calls for the temperature
 *       early_driver 1        the last three reasons have settings of 32 bits under their field values
 *       power_limit_w 700
 *       memory_mb 80000
 *       used_mb 0 500         from t = 0 on 500 MB of that are in use; more such lines as for power, none: 0
 *       no_memory 1           it reports no memory use
 *       capability 9.0        CUDA compute capability; default 9.0
 *       nvlink 1              NVLink connects it with the boards of the same number; default: none
 *       default_limit_w 700   the vendor's; default: not reported
 *       persistence 1
 *       ecc 1                 default: not reported
 *       compute_mode 2        nvmlComputeMode_t
 *       max_sm_clock 1980     MHz; default: not reported
 *       default_sm_clock 1590 of applications; likewise
 *       clocks 345 1980 15    clocks that the processors can be set to: from, to, in steps of
 *       reasons 1             bits of nvmlClocksEventReason...; default: not reported
 *       busy 0.35             kernels run for 35 % of the time; default: not reported
 *       user 4242 900 python  a process that computes on it: pid, MB, name; more such lines as there are
 *       mig 1
 *       no_counter 1          it has no energy counter, being older than Volta
 *       reset_at 3.0          at t = 3 the energy counter starts again from 0
 *       lost_at 3.0           from t = 3 on it has fallen off the bus
 *
 * The energy counter is the exact integral of the power up to the last tick. Everything is a function of the script
 * and the clock, so all processes see the same GPUs. A script that is replaced (by another file of its
 * name) is read again before the next call. An invalid script ends the process.
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
typedef struct {
    unsigned long long referenceTime, violationTime;
} nvmlViolationTime_t;
typedef union {
    double dVal;
    unsigned int uiVal;
    unsigned long long ullVal;
} nvmlValue_t;
typedef struct {
    unsigned int fieldId, scopeId;
    long long timestamp, latencyUsec;
    int valueType;
    nvmlReturn_t nvmlReturn;
    nvmlValue_t value;
} nvmlFieldValue_t;
enum { NVML_VALUE_TYPE_UNSIGNED_INT = 1, NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = 3 };
enum { NVML_CLOCK_SM = 1, NVML_CLOCK_MEM = 2 };
enum { NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION = 83, NVML_FI_DEV_POWER_AVERAGE = 185, NVML_FI_DEV_POWER_INSTANT = 186 };
enum { NVML_POWER_SCOPE_MODULE = 1, NVML_GPU_UTILIZATION_SAMPLES = 1 };
enum { NVML_P2P_CAPS_INDEX_NVLINK = 2, NVML_P2P_STATUS_OK = 0, NVML_P2P_STATUS_NOT_SUPPORTED = 5 };
enum { NVML_DEVICE_ARCH_PASCAL = 4, NVML_DEVICE_ARCH_HOPPER = 9 };
typedef struct {
    unsigned long long timeStamp;
    nvmlValue_t sampleValue;
} nvmlSample_t;
typedef struct {
    unsigned int pid;
    unsigned long long usedGpuMemory;
    unsigned int gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;

enum { BOARDS = 80, RULES = 160, TEXT = 256, USERS = 8 };

/* Why a board may hold its clocks down: field values, the first six of which are also nvmlPerfPolicyType_t. */
static const struct {
    const char *word;
    unsigned int field;
} reasons[] = {
    {"power", 74},       {"thermal", 75},     {"sync_boost", 76},  {"board_limit", 77},     {"low_utilization", 78},
    {"reliability", 79}, {"sw_thermal", 269}, {"hw_thermal", 270}, {"hw_power_brake", 271},
};
enum { REASONS = sizeof reasons / sizeof *reasons, POLICIES = 6 };

typedef struct {
    double from_s, value;
    int ramp; /* it was reached in a straight line from the one before */
} Segment;

typedef struct {
    Segment *segments;
    int n, room;
} Course;

typedef struct {
    unsigned int pid;
    double mb;
    char name[TEXT];
} User;

typedef struct Board {
    char uuid[TEXT], name[TEXT];
    double tick_ms, phase_ms, counter_mj, counter_gain, power_limit_w, memory_mb, reset_at, lost_at;
    double persistence, mig, no_counter, no_power_reading, averages, old_driver, early_driver, no_memory, capability;
    double default_limit_w, ecc, compute_mode, max_sm_clock, default_sm_clock, reasons, nvlink, busy;
    double clocks[3]; /* from, to, in steps of; none where the last is 0 */
    User users[USERS];
    int n_users;
    double counts_module, per_request_w;
    char followed[TEXT];
    long followed_to; /* so much of the file has been read */
    Course watts, module_watts, celsius, used_mb, sm_clock, memory_clock, throttle[REASONS];
} Board;
typedef Board *nvmlDevice_t;

/* Of a function, or a field value by its number: what it gives, or how long it takes. */
typedef struct {
    char function[64];
    Board *board; /* NULL: any */
    double value, from_s;
} Rule;

static struct {
    double start, call_ms;
    char driver[TEXT], trace[TEXT];
    Board boards[BOARDS];
    Rule fails[RULES], takes[RULES];
    int n_boards, n_fails, n_takes;
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

static void append(Course *course, Segment segment) {
    if (course->n == course->room) {
        course->room = course->room ? 2 * course->room : 8;
        course->segments = realloc(course->segments, (size_t)course->room * sizeof *course->segments);
        if (!course->segments) give_up("no memory");
    }
    course->segments[course->n++] = segment;
}

static void add_segment(Course *course, const char *word, const char *value) {
    Segment segment;
    char ramp[8] = "";
    if (sscanf(value, "%lf %lf %7s", &segment.from_s, &segment.value, ramp) < 2) give_up("%s %s", word, value);
    segment.ramp = !strcmp(ramp, "ramp");
    if (segment.ramp && !course->n) give_up("%s ramps up from nowhere", word);
    append(course, segment);
}

/* Read what is new in the file that a board follows. */
static void follow(Board *board) {
    FILE *file = fopen(board->followed, "r");
    if (!file) return; /* not yet there */
    fseek(file, board->followed_to, SEEK_SET);
    char line[TEXT];
    while (fgets(line, sizeof line, file) && strchr(line, '\n')) {
        double time_s, batch;
        if (sscanf(line, "{\"time\": %lf, \"batch\": %lf}", &time_s, &batch) < 2) give_up("batch %s", line);
        double watts = board->watts.segments[0].value + board->per_request_w * batch;
        append(&board->watts, (Segment){time_s - script.start, watts, 0});
        board->followed_to = ftell(file);
    }
    fclose(file);
}

static void add_rule(Rule *rules, int *n, Board *board, const char *word, const char *value) {
    if (*n == RULES) give_up("more than %d lines of %s", RULES, word);
    Rule *rule = &rules[(*n)++];
    rule->board = board;
    rule->from_s = -INFINITY;
    if (sscanf(value, "%63s %lf from %lf", rule->function, &rule->value, &rule->from_s) < 2)
        give_up("%s %s", word, value);
}

static void add_throttle(Board *board, const char *value) {
    for (int i = 0; i < REASONS; i++) {
        size_t length = strlen(reasons[i].word);
        if (!strncmp(value, reasons[i].word, length) && value[length] == ' ') {
            add_segment(&board->throttle[i], "throttle", value + length);
            return;
        }
    }
    give_up("throttle %s", value);
}

static void add_user(Board *board, const char *value) {
    if (board->n_users == USERS) give_up("more than %d lines of user", USERS);
    User *user = &board->users[board->n_users++];
    if (sscanf(value, "%u %lf %255[^\n]", &user->pid, &user->mb, user->name) < 3) give_up("user %s", value);
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
    } else if (!strcmp(word, "fail")) {
        add_rule(script.fails, &script.n_fails, board, word, value);
    } else if (!strcmp(word, "takes")) {
        add_rule(script.takes, &script.n_takes, board, word, value);
    } else if (!strcmp(word, "trace")) {
        snprintf(script.trace, TEXT, "%s", value);
    } else if (!strcmp(word, "device")) {
        if (script.n_boards == BOARDS) give_up("more than %d devices", BOARDS);
        board = &script.boards[script.n_boards++];
        memset(board, 0, sizeof *board);
        snprintf(board->uuid, TEXT, "%s", value);
        snprintf(board->name, TEXT, "Scripted");
        board->tick_ms = 20;
        board->counter_gain = 1;
        board->capability = 9.0;
        board->reset_at = board->lost_at = INFINITY;
        board->reasons = board->ecc = board->busy = -1;
    } else if (!board) {
        give_up("%s before any device", word);
    } else if (!strcmp(word, "name")) {
        snprintf(board->name, TEXT, "%s", value);
    } else if (!strcmp(word, "power")) {
        add_segment(&board->watts, word, value);
    } else if (!strcmp(word, "follows")) {
        if (sscanf(value, "%lf %255[^\n]", &board->per_request_w, board->followed) < 2) give_up("follows %s", value);
    } else if (!strcmp(word, "module_power")) {
        add_segment(&board->module_watts, word, value);
    } else if (!strcmp(word, "temperature")) {
        add_segment(&board->celsius, word, value);
    } else if (!strcmp(word, "used_mb")) {
        add_segment(&board->used_mb, word, value);
    } else if (!strcmp(word, "sm_clock")) {
        add_segment(&board->sm_clock, word, value);
    } else if (!strcmp(word, "memory_clock")) {
        add_segment(&board->memory_clock, word, value);
    } else if (!strcmp(word, "throttle")) {
        add_throttle(board, value);
    } else if (!strcmp(word, "user")) {
        add_user(board, value);
    } else if (!strcmp(word, "clocks")) {
        if (sscanf(value, "%lf %lf %lf", &board->clocks[0], &board->clocks[1], &board->clocks[2]) < 3)
            give_up("clocks %s", value);
    } else {
        const struct {
            const char *word;
            double *field;
        } numbers[] = {
            {"tick_ms", &board->tick_ms},         {"phase_ms", &board->phase_ms},
            {"counter_mj", &board->counter_mj},   {"reset_at", &board->reset_at},
            {"lost_at", &board->lost_at},         {"memory_mb", &board->memory_mb},
            {"persistence", &board->persistence}, {"power_limit_w", &board->power_limit_w},
            {"mig", &board->mig},                 {"no_counter", &board->no_counter},
            {"averages", &board->averages},       {"no_power_reading", &board->no_power_reading},
            {"old_driver", &board->old_driver},   {"early_driver", &board->early_driver},
            {"no_memory", &board->no_memory},     {"capability", &board->capability},
            {"ecc", &board->ecc},                 {"default_limit_w", &board->default_limit_w},
            {"reasons", &board->reasons},         {"compute_mode", &board->compute_mode},
            {"max_sm_clock", &board->max_sm_clock}, {"default_sm_clock", &board->default_sm_clock},
            {"counter_gain", &board->counter_gain}, {"counts_module", &board->counts_module},
            {"nvlink", &board->nvlink},           {"busy", &board->busy},
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

/* What a course is at, at t; whether it has begun. */
static int at(const Course *course, double t, double *value) {
    int begun = 0;
    for (int i = 0; i < course->n && course->segments[i].from_s <= t; i++) {
        const Segment *now = &course->segments[i], *next = i + 1 < course->n ? now + 1 : NULL;
        *value = now->value;
        if (next && next->ramp && t < next->from_s)
            *value += (next->value - now->value) * (t - now->from_s) / (next->from_s - now->from_s);
        begun = 1;
    }
    return begun;
}

/* The integral of a course from t = a to t = b. */
static double integral(const Course *course, double a, double b) {
    double sum = 0;
    for (int i = 0; i < course->n; i++) {
        const Segment *now = &course->segments[i], *next = i + 1 < course->n ? now + 1 : NULL;
        double from = fmax(now->from_s, a), to = next ? fmin(next->from_s, b) : b;
        double slope = next && next->ramp ? (next->value - now->value) / (next->from_s - now->from_s) : 0;
        if (to > from) sum += (to - from) * (now->value + slope * ((from + to) / 2 - now->from_s));
    }
    return sum;
}

static unsigned long long counter_mj(const Board *board, double t) {
    double tick_s = board->tick_ms / 1000, phase_s = board->phase_ms / 1000;
    double mj_per_j = 1000 * board->counter_gain;
    const Course *watts = board->counts_module ? &board->module_watts : &board->watts;
    double ticked = floor((t - phase_s) / tick_s) * tick_s + phase_s;
    if (t < board->reset_at)
        return (unsigned long long)(board->counter_mj + mj_per_j * integral(watts, 0, ticked));
    return (unsigned long long)(mj_per_j * integral(watts, board->reset_at, ticked));
}

/* Power over the second before t. */
static int mean(const Course *course, double t, double *watts) {
    if (t < 1) return at(course, t, watts);
    *watts = integral(course, t - 1, t);
    return course->n > 0;
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

/* The rule for a function, or NULL. */
static const Rule *ruled(const Rule *rules, int n, const char *function, const Board *board) {
    for (int i = 0; i < n; i++)
        if (!strcmp(rules[i].function, function) && (!rules[i].board || rules[i].board == board) &&
            clock_s() - script.start >= rules[i].from_s)
            return &rules[i];
    return NULL;
}

static nvmlReturn_t failure(const char *function, const Board *board) {
    const Rule *rule = ruled(script.fails, script.n_fails, function, board);
    return rule ? (nvmlReturn_t)rule->value : NVML_SUCCESS;
}

static void call(const char *function, const Board *board) {
    pthread_mutex_lock(&lock);
    read_script();
    for (int i = 0; i < script.n_boards; i++)
        if (*script.boards[i].followed) follow(&script.boards[i]);
    const Rule *rule = ruled(script.takes, script.n_takes, function, board);
    double ms = rule ? rule->value : script.call_ms;
    struct timespec pause = {(time_t)(ms / 1000), (long)(fmod(ms, 1000) * 1e6)};
    nanosleep(&pause, NULL);
    asked = clock_s();
}

/* Whether a board can answer at all. */
static nvmlReturn_t answering(const char *function, nvmlDevice_t device) {
    if (!users) return NVML_ERROR_UNINITIALIZED;
    if (device < script.boards || device >= script.boards + script.n_boards) return NVML_ERROR_INVALID_ARGUMENT;
    if (asked - script.start >= device->lost_at) return NVML_ERROR_GPU_IS_LOST;
    return failure(function, device);
}

/* What stands between is done for a board that answers; it may change result, and value is traced. */
#define ENTER(device)                                                                                                 \
    nvmlDevice_t entered = (device);                                                                                  \
    call(__func__, entered);                                                                                          \
    unsigned long long value = 0;                                                                                     \
    nvmlReturn_t result = answering(__func__, entered);                                                               \
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
    call("nvmlInit", NULL);
    nvmlReturn_t result = failure("nvmlInit", NULL);
    if (result == NVML_SUCCESS) users++;
    trace("nvmlInit", NULL, result, (unsigned long long)users);
    pthread_mutex_unlock(&lock);
    return result;
}

nvmlReturn_t nvmlInit_v2(void) {
    return nvmlInitWithFlags(0);
}

nvmlReturn_t nvmlShutdown(void) {
    call(__func__, NULL);
    nvmlReturn_t result = users ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
    if (users) users--;
    trace("nvmlShutdown", NULL, result, (unsigned long long)users);
    pthread_mutex_unlock(&lock);
    return result;
}

const char *nvmlErrorString(nvmlReturn_t result) { /* nvidia-ml-py has words of its own for most */
    static char text[32];
    snprintf(text, sizeof text, "Scripted error %d", result);
    return text;
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    call(__func__, NULL);
    nvmlReturn_t result = users ? put(version, length, script.driver) : NVML_ERROR_UNINITIALIZED;
    trace(__func__, NULL, result, 0);
    pthread_mutex_unlock(&lock);
    return result;
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    call(__func__, NULL);
    nvmlReturn_t result = users ? NVML_ERROR_NOT_FOUND : NVML_ERROR_UNINITIALIZED;
    for (int i = 0; users && i < script.n_boards; i++) {
        if (!strcmp(script.boards[i].uuid, uuid)) {
            *device = &script.boards[i]; /* good for the next script too: boards keep their places */
            result = answering(__func__, *device);
        }
    }
    trace(__func__, NULL, result, 0);
    pthread_mutex_unlock(&lock);
    return result;
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) {
    call(__func__, NULL);
    *count = (unsigned int)script.n_boards;
    nvmlReturn_t result = users ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
    trace(__func__, NULL, result, *count);
    pthread_mutex_unlock(&lock);
    return result;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device) {
    call(__func__, NULL);
    *device = &script.boards[index < BOARDS ? index : 0];
    nvmlReturn_t result = index < (unsigned int)script.n_boards ? answering(__func__, *device) : NVML_ERROR_INVALID_ARGUMENT;
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
    int has_power = (device->averages ? mean(&device->watts, asked - script.start, &watts)
                                                : at(&device->watts, asked - script.start, &watts));
    if (device->no_power_reading || !has_power)
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

nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, int type, unsigned int *mhz) {
    ENTER(device)
    double clock = 0;
    if (type != NVML_CLOCK_SM && type != NVML_CLOCK_MEM)
        result = NVML_ERROR_INVALID_ARGUMENT;
    else if (!at(type == NVML_CLOCK_SM ? &device->sm_clock : &device->memory_clock, asked - script.start, &clock))
        result = NVML_ERROR_NOT_SUPPORTED;
    else
        *mhz = value = (unsigned int)clock;
    LEAVE
}

nvmlReturn_t nvmlDeviceGetViolationStatus(nvmlDevice_t device, int policy, nvmlViolationTime_t *time) {
    ENTER(device)
    if (policy < 0 || policy >= POLICIES) {
        result = NVML_ERROR_INVALID_ARGUMENT;
    } else if (!device->throttle[policy].n) {
        result = NVML_ERROR_NOT_SUPPORTED;
    } else {
        time->referenceTime = (unsigned long long)(asked * 1e6);
        time->violationTime = value =
            (unsigned long long)(1e9 * integral(&device->throttle[policy], 0, asked - script.start));
    }
    LEAVE
}

/* A field value at t. */
static nvmlReturn_t field(const Board *board, double t, nvmlFieldValue_t *one) {
    char number[16];
    snprintf(number, sizeof number, "%u", one->fieldId);
    nvmlReturn_t failed = failure(number, board);
    if (failed != NVML_SUCCESS) return failed;
    double watts = 0;
    const Course *power = one->scopeId ? &board->module_watts : &board->watts;
    one->valueType = NVML_VALUE_TYPE_UNSIGNED_LONG_LONG;
    switch (one->fieldId) {
    case NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION:
        one->value.ullVal = counter_mj(board, t);
        return board->no_counter ? NVML_ERROR_NOT_SUPPORTED : NVML_SUCCESS;
    case NVML_FI_DEV_POWER_INSTANT:
    case NVML_FI_DEV_POWER_AVERAGE:
        if (board->no_power_reading || one->scopeId > NVML_POWER_SCOPE_MODULE) return NVML_ERROR_NOT_SUPPORTED;
        if (!(one->fieldId == NVML_FI_DEV_POWER_INSTANT ? at(power, t, &watts) : mean(power, t, &watts)))
            return NVML_ERROR_NOT_SUPPORTED;
        one->valueType = NVML_VALUE_TYPE_UNSIGNED_INT;
        one->value.uiVal = (unsigned int)(watts * 1000);
        return NVML_SUCCESS;
    }
    if (board->early_driver && one->fieldId > 268) {
        one->valueType = NVML_VALUE_TYPE_UNSIGNED_INT;
        one->value.uiVal = 0;
        return NVML_SUCCESS;
    }
    for (int i = 0; i < REASONS; i++) {
        if (one->fieldId == reasons[i].field && board->throttle[i].n) {
            one->value.ullVal = (unsigned long long)(1e9 * integral(&board->throttle[i], 0, t));
            return NVML_SUCCESS;
        }
    }
    return NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int n, nvmlFieldValue_t *values) {
    ENTER(device)
    for (int i = 0; i < n; i++) {
        values[i].timestamp = (long long)(asked * 1e6);
        values[i].nvmlReturn = field(device, asked - script.start, &values[i]);
    }
    value = (unsigned long long)n;
    LEAVE
}

nvmlReturn_t nvmlDeviceGetArchitecture(nvmlDevice_t device, unsigned int *architecture) {
    ENTER(device)
    *architecture = value = device->no_counter ? NVML_DEVICE_ARCH_PASCAL : NVML_DEVICE_ARCH_HOPPER;
    LEAVE
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) {
    call(__func__, NULL);
    nvmlReturn_t result = users ? failure(__func__, NULL) : NVML_ERROR_UNINITIALIZED;
    *version = 13000;
    trace(__func__, NULL, result, 13000);
    pthread_mutex_unlock(&lock);
    return result;
}

nvmlReturn_t nvmlSystemGetProcessName(unsigned int pid, char *name, unsigned int length) {
    call(__func__, NULL);
    nvmlReturn_t result = users ? NVML_ERROR_NOT_FOUND : NVML_ERROR_UNINITIALIZED;
    for (int i = 0; users && i < script.n_boards; i++)
        for (int j = 0; j < script.boards[i].n_users; j++)
            if (script.boards[i].users[j].pid == pid) result = put(name, length, script.boards[i].users[j].name);
    trace(__func__, NULL, result, pid);
    pthread_mutex_unlock(&lock);
    return result;
}

nvmlReturn_t nvmlDeviceGetPowerManagementDefaultLimit(nvmlDevice_t device, unsigned int *milliwatts) {
    ENTER(device)
    if (!device->default_limit_w)
        result = NVML_ERROR_NOT_SUPPORTED;
    else
        *milliwatts = value = (unsigned int)(device->default_limit_w * 1000);
    LEAVE
}

nvmlReturn_t nvmlDeviceGetEccMode(nvmlDevice_t device, unsigned int *current, unsigned int *pending) {
    ENTER(device)
    if (device->ecc < 0)
        result = NVML_ERROR_NOT_SUPPORTED;
    else
        *current = *pending = device->ecc != 0;
    LEAVE
}

nvmlReturn_t nvmlDeviceGetComputeMode(nvmlDevice_t device, unsigned int *mode) {
    ENTER(device)
    *mode = (unsigned int)device->compute_mode;
    LEAVE
}

nvmlReturn_t nvmlDeviceGetP2PStatus(nvmlDevice_t device, nvmlDevice_t other, int kind, int *status) {
    ENTER(device)
    int connected = device->nvlink && device->nvlink == other->nvlink;
    *status = kind == NVML_P2P_CAPS_INDEX_NVLINK && connected ? NVML_P2P_STATUS_OK : NVML_P2P_STATUS_NOT_SUPPORTED;
    LEAVE
}

/* MHz, where there are any. */
static nvmlReturn_t told_mhz(double clock, int type, unsigned int *mhz) {
    if (type != NVML_CLOCK_SM || !clock) return NVML_ERROR_NOT_SUPPORTED;
    *mhz = (unsigned int)clock;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, int type, unsigned int *mhz) {
    ENTER(device)
    result = told_mhz(device->max_sm_clock, type, mhz);
    LEAVE
}

nvmlReturn_t nvmlDeviceGetDefaultApplicationsClock(nvmlDevice_t device, int type, unsigned int *mhz) {
    ENTER(device)
    result = told_mhz(device->default_sm_clock, type, mhz);
    LEAVE
}

/* A list as NVML gives it: how many there are, and only where there is room for all of them, these. */
static nvmlReturn_t told_list(unsigned int n, unsigned int *count) {
    unsigned int room = *count;
    *count = n;
    return n > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetSupportedMemoryClocks(nvmlDevice_t device, unsigned int *count, unsigned int *mhz) {
    ENTER(device)
    if (!device->clocks[2])
        result = NVML_ERROR_NOT_SUPPORTED;
    else if ((result = told_list(1, count)) == NVML_SUCCESS)
        mhz[0] = 2619;
    LEAVE
}

nvmlReturn_t nvmlDeviceGetSupportedGraphicsClocks(nvmlDevice_t device, unsigned int memory, unsigned int *count,
                                                  unsigned int *mhz) {
    ENTER(device)
    double from = device->clocks[0], step = device->clocks[2];
    if (!step || memory != 2619)
        result = NVML_ERROR_NOT_FOUND;
    else if ((result = told_list((unsigned int)((device->clocks[1] - from) / step) + 1, count)) == NVML_SUCCESS)
        for (unsigned int i = 0; i < *count; i++) mhz[i] = (unsigned int)(from + (*count - 1 - i) * step);
    LEAVE
}

nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long *bits) {
    ENTER(device)
    if (device->reasons < 0)
        result = NVML_ERROR_NOT_SUPPORTED;
    else
        *bits = value = (unsigned long long)device->reasons;
    LEAVE
}

nvmlReturn_t nvmlDeviceGetSamples(nvmlDevice_t device, int type, unsigned long long since, int *kind,
                                  unsigned int *count, nvmlSample_t *samples) {
    ENTER(device)
    *kind = NVML_VALUE_TYPE_UNSIGNED_INT;
    if (type != NVML_GPU_UTILIZATION_SAMPLES || device->busy < 0)
        result = NVML_ERROR_NOT_SUPPORTED;
    else if (!samples)
        *count = 1;
    else
        samples[0] = (nvmlSample_t){since, {.uiVal = (unsigned int)(device->busy * 100)}};
    LEAVE
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int *count,
                                                     nvmlProcessInfo_t *processes) {
    ENTER(device)
    if ((result = told_list((unsigned int)device->n_users, count)) == NVML_SUCCESS)
        for (unsigned int i = 0; i < *count; i++) {
            const User *user = &device->users[i];
            processes[i] = (nvmlProcessInfo_t){user->pid, (unsigned long long)(user->mb * 1e6), 0, 0};
        }
    LEAVE
}

nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t device, unsigned int *count,
                                                      nvmlProcessInfo_t *processes) {
    ENTER(device)
    (void)processes;
    *count = 0;
    LEAVE
}
