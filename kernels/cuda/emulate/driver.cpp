// The part of the CUDA driver's interface that bkpack calls, over the emulator. Device memory is host memory that ends at
// a page which cannot be touched. What is put on a stream happens when the stream is waited for and not before, so that a
// missing wait shows; a stream that is captured records instead, and a graph replays. A test tool: it computes what a card
// would, thousands of times slower.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include "emulator.h"

using emulator::Kernel;

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    LAUNCH_OUT_OF_RESOURCES = 701,
    NOT_SUPPORTED = 801,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_UNMATCHED = 902,
};

typedef unsigned long long Pointer;

constexpr size_t PAGE = 4096, SHARED_BYTES = 49152;

std::recursive_mutex lock;
#define ALONE std::lock_guard<std::recursive_mutex> alone(lock)

struct Allocation {
    void* mapped;
    size_t mapped_bytes, bytes;
};
std::map<Pointer, Allocation> allocations;
size_t allocated;

size_t total_memory() {
    const char* bytes = getenv("BKPACK_EMULATOR_MEMORY");
    return bytes ? strtoull(bytes, nullptr, 10) : size_t(8) << 30;
}

// What a test makes the emulator pretend: BKPACK_EMULATOR_DRIVER (11040 is CUDA 11.4), BKPACK_EMULATOR_DEVICES,
// BKPACK_EMULATOR_CAPABILITY (75 is 7.5), BKPACK_EMULATOR_SHARED (bytes of shared memory that a block may ask for), and
// BKPACK_EMULATOR_CAPTURE=0, a driver that records no graphs.
int setting(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

size_t most_shared_bytes() { return size_t(setting("BKPACK_EMULATOR_SHARED", 166912)); }

typedef std::vector<std::function<void()>> Steps;

struct Graph {
    Steps steps;
};
struct Stream {
    Steps waiting;
    std::unique_ptr<Graph> recorded;
    bool invalidated = false;  // the capture, by a call that it does not allow
};
Stream default_stream;
std::set<Stream*> streams = {&default_stream};
Stream* stream_of(void* handle) {
    // Null, and the two constants that name the default streams.
    return reinterpret_cast<uintptr_t>(handle) <= 2 ? &default_stream : static_cast<Stream*>(handle);
}

// Does it when the stream is waited for, or when the graph that is being recorded is launched.
Result enqueue(void* handle, std::function<void()> step) {
    Stream* stream = stream_of(handle);
    if (stream->invalidated) return STREAM_CAPTURE_INVALIDATED;
    (stream->recorded ? stream->recorded->steps : stream->waiting).push_back(std::move(step));
    return SUCCESS;
}

void finish(Stream* stream) {
    Steps steps = std::move(stream->waiting);
    stream->waiting.clear();
    for (const auto& step : steps) step();
}

void finish_all() {
    for (Stream* stream : streams) finish(stream);
}

bool capturing_anywhere;

// What synchronizes is refused while a stream is captured, as on a card.
#define NOT_WHILE_CAPTURING \
    if (capturing_anywhere) return STREAM_CAPTURE_UNSUPPORTED

struct Function {
    const Kernel* kernel;
    size_t most_shared = SHARED_BYTES;
};
std::map<std::string, Function>& functions() {
    static std::map<std::string, Function> all = [] {
        std::map<std::string, Function> found;
        for (const Kernel& kernel : emulator::kernels()) found[kernel.name] = {&kernel};
        return found;
    }();
    return all;
}

// The text of a module, by whose entries its functions are found.
struct Module {
    std::string text;
};

int context;
thread_local void* current_context;

// A card's calls work on what is current on their thread.
#define IN_CONTEXT \
    if (!current_context) return INVALID_CONTEXT

bool inside(Pointer at, size_t bytes) {
    auto after = allocations.upper_bound(at);
    if (after == allocations.begin()) return false;
    const auto& [start, allocation] = *std::prev(after);
    return at - start <= allocation.bytes && bytes <= allocation.bytes - (at - start);
}

Result copy(void* to, const void* from, size_t bytes, Pointer device, Pointer other = 0) {
    if (bytes == 0) return SUCCESS;
    if (!inside(device, bytes) || (other && !inside(other, bytes))) return INVALID_VALUE;
    memmove(to, from, bytes);
    return SUCCESS;
}

template <class T>
Result fill(Pointer to, T value, size_t count, void* stream) {
    if (count && !inside(to, count * sizeof(T))) return INVALID_VALUE;
    return enqueue(stream, [=] { std::fill_n(reinterpret_cast<T*>(to), count, value); });
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) Result

API cuInit(unsigned) { return SUCCESS; }
API cuDriverGetVersion(int* version) { return *version = setting("BKPACK_EMULATOR_DRIVER", 13000), SUCCESS; }
API cuDeviceGetCount(int* count) { return *count = setting("BKPACK_EMULATOR_DEVICES", 1), SUCCESS; }
API cuDeviceGet(int* device, int ordinal) { return *device = 0, ordinal == 0 ? SUCCESS : Result(101); }
API cuDeviceGetName(char* name, int bytes, int) {
    snprintf(name, size_t(bytes), "bkpack CUDA emulator (no GPU)");
    return SUCCESS;
}
API cuDeviceGetUuid(void* uuid, int) { return memset(uuid, 0, 16), SUCCESS; }
API cuDeviceGetUuid_v2(void* uuid, int) { return memset(uuid, 0, 16), SUCCESS; }
API cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = total_memory(), SUCCESS; }
API cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 1: *value = 1024; break;                          // threads a block
        case 2: *value = 1024; break;                          // in x
        case 5: *value = 2147483647; break;                    // blocks in x
        case 6: case 7: *value = 65535; break;                 // in y, z
        case 8: *value = int(SHARED_BYTES); break;             // shared memory a block
        case 10: *value = 32; break;                           // lanes
        case 12: *value = 65536; break;                        // registers a block
        case 16: *value = 2; break;                            // multiprocessors
        case 39: *value = 2048; break;                         // threads a multiprocessor
        case 75: *value = setting("BKPACK_EMULATOR_CAPABILITY", 80) / 10; break;  // compute capability
        case 76: *value = setting("BKPACK_EMULATOR_CAPABILITY", 80) % 10; break;
        case 81: *value = int(most_shared_bytes() + 1024); break;  // shared memory a multiprocessor
        case 97: *value = int(most_shared_bytes()); break;     // shared memory a block may ask for
        default: *value = 0;
    }
    return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void** handle, int) { return *handle = &context, SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void* handle) { return current_context = handle, SUCCESS; }
API cuCtxGetCurrent(void** handle) { return *handle = current_context, SUCCESS; }
API cuCtxGetDevice(int* device) { return *device = 0, SUCCESS; }
API cuCtxSynchronize() {
    ALONE;
    IN_CONTEXT;
    NOT_WHILE_CAPTURING;
    return finish_all(), SUCCESS;
}
API cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = *greatest = 0, SUCCESS; }
API cuCtxSetFlags(unsigned) { return SUCCESS; }
API cuCtxSetLimit(int, size_t) { return SUCCESS; }
API cuCtxSetCacheConfig(int) { return SUCCESS; }

API cuGetErrorName(int error, const char** name) {
    switch (error) {
        case SUCCESS: *name = "CUDA_SUCCESS"; break;
        case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
        case LAUNCH_OUT_OF_RESOURCES: *name = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"; break;
        case STREAM_CAPTURE_UNSUPPORTED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        case STREAM_CAPTURE_INVALIDATED: *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
        default: *name = "CUDA_ERROR";
    }
    return SUCCESS;
}
API cuGetErrorString(int error, const char** text) {
    switch (error) {
        case SUCCESS: *text = "no error"; break;
        case INVALID_VALUE: *text = "invalid argument"; break;
        case OUT_OF_MEMORY: *text = "out of memory"; break;
        case INVALID_CONTEXT: *text = "invalid device context"; break;
        case NOT_FOUND: *text = "named symbol not found"; break;
        case LAUNCH_OUT_OF_RESOURCES: *text = "too many resources requested for launch"; break;
        case STREAM_CAPTURE_UNSUPPORTED: *text = "operation not permitted when stream is capturing"; break;
        case STREAM_CAPTURE_INVALIDATED: *text = "operation failed due to a previous error during capture"; break;
        default: *text = "an error of the CUDA emulator";
    }
    return SUCCESS;
}

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    ALONE;
    IN_CONTEXT;
    *total = total_memory();
    *free = *total > allocated ? *total - allocated : 0;
    return SUCCESS;
}
API cuMemAlloc_v2(Pointer* pointer, size_t bytes) {
    ALONE;
    IN_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    // Sixteen bytes is what every kernel may read up to.
    const size_t room = (bytes + 15) / 16 * 16, pages = (room + PAGE - 1) / PAGE * PAGE;
    if (allocated + pages > total_memory()) return OUT_OF_MEMORY;
    void* mapped = mmap(nullptr, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(static_cast<char*>(mapped) + pages, PAGE, PROT_NONE);
    *pointer = Pointer(mapped) + pages - room;
    // Fresh memory of a card holds anything. NaN shows where it is used; large buffers stay unwritten to stay cheap.
    if (bytes <= size_t(64) << 20) memset(reinterpret_cast<void*>(*pointer), 0xff, room);
    allocations[*pointer] = {mapped, pages + PAGE, bytes};
    allocated += pages;
    return SUCCESS;
}
API cuMemFree_v2(Pointer pointer) {
    ALONE;
    IN_CONTEXT;
    NOT_WHILE_CAPTURING;
    // Waits for all work, as on a card.
    finish_all();
    if (pointer == 0) return SUCCESS;
    auto found = allocations.find(pointer);
    if (found == allocations.end()) return INVALID_VALUE;
    munmap(found->second.mapped, found->second.mapped_bytes);
    allocated -= found->second.mapped_bytes - PAGE;
    allocations.erase(found);
    return SUCCESS;
}
API cuMemAllocAsync(Pointer* pointer, size_t bytes, void* stream) {
    if (stream_of(stream)->recorded) return STREAM_CAPTURE_UNSUPPORTED;
    return cuMemAlloc_v2(pointer, bytes);
}
API cuMemFreeAsync(Pointer pointer, void* stream) {
    if (stream_of(stream)->recorded) return STREAM_CAPTURE_UNSUPPORTED;
    return cuMemFree_v2(pointer);
}
API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    return *pointer = aligned_alloc(64, (bytes + 63) / 64 * 64), *pointer ? SUCCESS : OUT_OF_MEMORY;
}
API cuMemFreeHost(void* pointer) { return free(pointer), SUCCESS; }

API cuMemcpyHtoD_v2(Pointer to, const void* from, size_t bytes) {
    ALONE;
    IN_CONTEXT;
    NOT_WHILE_CAPTURING;
    finish(&default_stream);
    return copy(reinterpret_cast<void*>(to), from, bytes, to);
}
API cuMemcpyDtoH_v2(void* to, Pointer from, size_t bytes) {
    ALONE;
    IN_CONTEXT;
    NOT_WHILE_CAPTURING;
    finish(&default_stream);
    return copy(to, reinterpret_cast<void*>(from), bytes, from);
}
API cuMemcpyDtoD_v2(Pointer to, Pointer from, size_t bytes) {
    ALONE;
    IN_CONTEXT;
    NOT_WHILE_CAPTURING;
    finish(&default_stream);
    return copy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes, to, from);
}
API cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void* stream) {
    ALONE;
    IN_CONTEXT;
    if (bytes && !inside(to, bytes)) return INVALID_VALUE;
    return enqueue(stream, [=] { copy(reinterpret_cast<void*>(to), from, bytes, to); });
}
API cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void* stream) {
    ALONE;
    IN_CONTEXT;
    if (bytes && !inside(from, bytes)) return INVALID_VALUE;
    return enqueue(stream, [=] { copy(to, reinterpret_cast<void*>(from), bytes, from); });
}
API cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void* stream) {
    ALONE;
    IN_CONTEXT;
    if (bytes && (!inside(to, bytes) || !inside(from, bytes))) return INVALID_VALUE;
    return enqueue(stream, [=] { copy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes, to, from); });
}
API cuMemsetD8Async(Pointer to, unsigned char value, size_t count, void* stream) {
    ALONE;
    IN_CONTEXT;
    return fill(to, value, count, stream);
}
API cuMemsetD32Async(Pointer to, unsigned value, size_t count, void* stream) {
    ALONE;
    IN_CONTEXT;
    return fill(to, value, count, stream);
}
API cuMemsetD8_v2(Pointer to, unsigned char value, size_t count) { return cuMemsetD8Async(to, value, count, nullptr); }
API cuMemsetD32_v2(Pointer to, unsigned value, size_t count) { return cuMemsetD32Async(to, value, count, nullptr); }

API cuModuleLoadData(void** handle, const void* image) {
    IN_CONTEXT;
    *handle = new Module{static_cast<const char*>(image)};
    return SUCCESS;
}
API cuModuleLoadDataEx(void** handle, const void* image, unsigned, int*, void**) { return cuModuleLoadData(handle, image); }
API cuModuleUnload(void* handle) {
    IN_CONTEXT;
    return delete static_cast<Module*>(handle), SUCCESS;
}
API cuModuleGetFunction(void** handle, void* module, const char* name) {
    ALONE;
    // Only what the PTX declares, so that a kernel asked of the wrong file is not found.
    const std::string& text = static_cast<Module*>(module)->text;
    if (text.find(".entry " + std::string(name) + "(") == std::string::npos) return NOT_FOUND;
    auto found = functions().find(name);
    if (found == functions().end()) return NOT_FOUND;
    return *handle = &found->second, SUCCESS;
}
API cuFuncSetAttribute(void* handle, int attribute, int value) {
    constexpr int MOST_DYNAMIC_SHARED = 8;
    if (attribute == MOST_DYNAMIC_SHARED) {
        if (value < 0 || size_t(value) > most_shared_bytes()) return INVALID_VALUE;
        static_cast<Function*>(handle)->most_shared = size_t(value);
    }
    return SUCCESS;
}
API cuFuncGetAttribute(int* value, int, void*) { return *value = 0, SUCCESS; }
API cuFuncSetCacheConfig(void*, int) { return SUCCESS; }
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) { return *blocks = 1, SUCCESS; }
API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void*, int, size_t, unsigned) {
    return *blocks = 1, SUCCESS;
}

API cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void* stream, void** arguments, void** extra) {
    ALONE;
    IN_CONTEXT;
    if (!handle) return INVALID_HANDLE;
    if (extra) return NOT_SUPPORTED;
    const Function& function = *static_cast<Function*>(handle);
    const size_t threads = size_t(block_x) * block_y * block_z;
    if (!grid_x || !grid_y || !grid_z || !threads || threads > 1024) return INVALID_VALUE;
    if (grid_x > 2147483647u || grid_y > 65535 || grid_z > 65535) return INVALID_VALUE;
    if (threads > function.kernel->most_threads) return LAUNCH_OUT_OF_RESOURCES;
    if (shared > function.most_shared) return INVALID_VALUE;
    // Arguments are read at the call, whenever the kernel runs.
    auto values = std::make_shared<std::vector<std::vector<unsigned char>>>();
    for (size_t i = 0; i < function.kernel->argument_bytes.size(); i++) {
        const unsigned char* from = static_cast<unsigned char*>(arguments[i]);
        values->emplace_back(from, from + function.kernel->argument_bytes[i]);
    }
    const Kernel* kernel = function.kernel;
    return enqueue(stream, [=] {
        std::vector<void*> pointers;
        for (auto& value : *values) pointers.push_back(value.data());
        emulator::run(*kernel, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, pointers.data());
    });
}

API cuStreamCreate(void** handle, unsigned) {
    ALONE;
    IN_CONTEXT;
    Stream* stream = new Stream;
    streams.insert(stream);
    return *handle = stream, SUCCESS;
}
API cuStreamCreateWithPriority(void** handle, unsigned flags, int) { return cuStreamCreate(handle, flags); }
API cuStreamDestroy_v2(void* handle) {
    ALONE;
    Stream* stream = stream_of(handle);
    if (stream == &default_stream) return INVALID_HANDLE;
    finish(stream);
    streams.erase(stream);
    return delete stream, SUCCESS;
}
API cuStreamSynchronize(void* handle) {
    ALONE;
    Stream* stream = stream_of(handle);
    if (stream->recorded) {
        stream->invalidated = true;
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    return finish(stream), SUCCESS;
}
API cuStreamQuery(void* handle) { return cuStreamSynchronize(handle); }
API cuStreamWaitEvent(void*, void*, unsigned) { return SUCCESS; }
API cuStreamBeginCapture_v2(void* handle, int) {
    ALONE;
    if (stream_of(handle) == &default_stream || capturing_anywhere) return STREAM_CAPTURE_UNSUPPORTED;
    if (!setting("BKPACK_EMULATOR_CAPTURE", 1)) return STREAM_CAPTURE_UNSUPPORTED;
    stream_of(handle)->recorded = std::make_unique<Graph>();
    capturing_anywhere = true;
    return SUCCESS;
}
API cuStreamEndCapture(void* handle, void** graph) {
    ALONE;
    Stream* stream = stream_of(handle);
    if (!stream->recorded) return STREAM_CAPTURE_UNMATCHED;
    capturing_anywhere = false;
    std::unique_ptr<Graph> recorded = std::move(stream->recorded);
    if (std::exchange(stream->invalidated, false)) return *graph = nullptr, STREAM_CAPTURE_INVALIDATED;
    return *graph = recorded.release(), SUCCESS;
}
API cuStreamIsCapturing(void* handle, int* status) { return *status = stream_of(handle)->recorded ? 1 : 0, SUCCESS; }
API cuThreadExchangeStreamCaptureMode(int*) { return SUCCESS; }
API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    return *executable = new Graph(*static_cast<Graph*>(graph)), SUCCESS;
}
API cuGraphUpload(void*, void*) { return SUCCESS; }
API cuGraphLaunch(void* executable, void* stream) {
    ALONE;
    IN_CONTEXT;
    const Graph graph = *static_cast<Graph*>(executable);
    return enqueue(stream, [graph] {
        for (const auto& step : graph.steps) step();
    });
}
API cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), SUCCESS; }
API cuGraphExecDestroy(void* executable) { return delete static_cast<Graph*>(executable), SUCCESS; }

API cuEventCreate(void** handle, unsigned) { return *handle = new char, SUCCESS; }
API cuEventDestroy_v2(void* handle) { return delete static_cast<char*>(handle), SUCCESS; }
API cuEventRecord(void*, void*) { return SUCCESS; }
API cuEventQuery(void*) { return SUCCESS; }
API cuEventSynchronize(void*) { return SUCCESS; }
API cuEventElapsedTime(float* milliseconds, void*, void*) { return *milliseconds = 0, SUCCESS; }
API cuEventElapsedTime_v2(float* milliseconds, void*, void*) { return *milliseconds = 0, SUCCESS; }
