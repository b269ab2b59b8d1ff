// Runs a block's threads as fibers on one CPU thread: deterministic, and strict about barriers. A barrier that some
// threads of a block or warp never reach, an operation of a warp that its lanes do not share, and an access outside an
// allocation end the program with a message. Warps run from barrier to barrier, first to last, or with
// BKPACK_EMULATOR_ORDER=reverse (which turns the order of blocks, too) last to first: a barrier that is missing shows in
// one of the two.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "emulator.h"

#ifndef __x86_64__
#error "the emulator's switch between fibers is written for x86-64"
#endif

namespace emulator {

Dimensions thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t STACK_BYTES = 64 << 10, MOST_THREADS = 1024, SLOT_BYTES = 64;

enum class Wait { None, Warp, Block, Done };

struct Copy {
    void* to;
    const void* from;
    bool there;
    unsigned group;
};

struct Fiber {
    void* stack_pointer;
    Wait wait;
    std::vector<Copy> copies;
    unsigned groups;  // of copies committed
};

struct Warp {
    int operation;
    unsigned parity;
    alignas(16) unsigned char slots[2][32 * SLOT_BYTES];
};

Fiber fibers[MOST_THREADS];
Warp warps[MOST_THREADS / 32];
unsigned current;
char* stacks;
void* scheduler;
const Kernel* running;
void** running_arguments;
void* shared_memory;
bool backwards;
size_t shared_capacity;

extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size emulator_switch, .-emulator_switch
)");

void give_way(Wait wait) {
    fibers[current].wait = wait;
    emulator_switch(&fibers[current].stack_pointer, scheduler);
}

void fiber_main() {
    running->call(running->function, running_arguments);
    for (const Copy& copy : fibers[current].copies) {
        (void)copy;
        fail("a thread ended with copies under way");
    }
    give_way(Wait::Done);
    __builtin_unreachable();
}

void start(unsigned thread) {
    char* top = stacks + (thread + 1) * STACK_BYTES;
    void** frame = reinterpret_cast<void**>(top) - 8;
    memset(frame, 0, 8 * sizeof(void*));
    frame[6] = reinterpret_cast<void*>(fiber_main);  // where the switch returns to, below six saved registers
    fibers[thread].stack_pointer = frame;
    fibers[thread].wait = Wait::None;
    fibers[thread].copies.clear();
    fibers[thread].groups = 0;
}

void resume(unsigned thread) {
    current = thread;
    thread_index = {thread, 0, 0};
    emulator_switch(&scheduler, fibers[thread].stack_pointer);
}

// Runs a warp until all its lanes wait for the block or are done.
void run_warp(unsigned warp, unsigned threads) {
    const unsigned first = warp * 32, end = std::min(first + 32, threads);
    for (;;) {
        unsigned waiting = 0, done = 0;
        for (unsigned i = first; i < end; i++) {
            const unsigned thread = backwards ? end - 1 - (i - first) : i;
            if (fibers[thread].wait == Wait::None) resume(thread);
            waiting += fibers[thread].wait == Wait::Warp;
            done += fibers[thread].wait == Wait::Done;
        }
        if (waiting == 0) return;
        if (waiting < end - first || end - first < 32) {
            fail(done ? "lanes have left before an operation of their warp" : "lanes of a warp wait at different barriers");
        }
        warps[warp].parity ^= 1;
        warps[warp].operation = 0;
        for (unsigned thread = first; thread < end; thread++) fibers[thread].wait = Wait::None;
    }
}

void run_block(unsigned threads) {
    for (unsigned thread = 0; thread < threads; thread++) start(thread);
    for (;;) {
        unsigned waiting = 0;
        const unsigned count = (threads + 31) / 32;
        for (unsigned warp = 0; warp < count; warp++) run_warp(backwards ? count - 1 - warp : warp, threads);
        for (unsigned thread = 0; thread < threads; thread++) waiting += fibers[thread].wait == Wait::Block;
        if (waiting == 0) return;
        for (unsigned thread = 0; thread < threads; thread++) {
            if (fibers[thread].wait == Wait::Block) fibers[thread].wait = Wait::None;
        }
    }
}

struct sigaction before_us;

void on_fault(int signal, siginfo_t* info, void* context) {
    if (running) {
        fprintf(stderr, "CUDA emulator: %s, block (%u, %u, %u), thread %u: an access outside every allocation, at %p\n",
                running->name, block_index.x, block_index.y, block_index.z, thread_index.x, info->si_addr);
        _exit(134);
    }
    if (before_us.sa_flags & SA_SIGINFO) before_us.sa_sigaction(signal, info, context);
    ::signal(signal, SIG_DFL);
}

}  // namespace

void fail(const char* why) {
    fprintf(stderr, "CUDA emulator: %s, block (%u, %u, %u), thread %u: %s\n", running ? running->name : "no kernel",
            block_index.x, block_index.y, block_index.z, thread_index.x, why);
    _exit(134);
}

void* dynamic_shared() { return shared_memory; }
void block_barrier() { give_way(Wait::Block); }

void warp_barrier() {
    unsigned char nothing = 0;
    exchange(&nothing, 1, 7);
}

const void* exchange(const void* own, unsigned bytes, int operation) {
    Warp& warp = warps[current / 32];
    if (bytes > SLOT_BYTES) fail("an operation of a warp on too large a value");
    if (warp.operation == 0) warp.operation = operation;
    if (warp.operation != operation) fail("lanes of a warp are at different operations");
    unsigned char* slots = warp.slots[warp.parity];
    memcpy(slots + current % 32 * bytes, own, bytes);
    give_way(Wait::Warp);
    return slots;
}

// A copy happens when it is waited for and not before, so that a missing wait shows.
void copy_async(void* to, const void* from, bool there) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) fail("a copy is not aligned");
    fibers[current].copies.push_back({to, from, there, fibers[current].groups});
}
void copy_commit() { fibers[current].groups++; }
void copy_wait(int pending) {
    Fiber& fiber = fibers[current];
    size_t kept = 0;
    for (const Copy& copy : fiber.copies) {
        if (copy.group + pending >= fiber.groups) {
            fiber.copies[kept++] = copy;
        } else if (copy.there) {
            memcpy(copy.to, copy.from, 16);
        } else {
            memset(copy.to, 0, 16);
        }
    }
    fiber.copies.resize(kept);
}

void run(const Kernel& kernel, Dimensions grid, Dimensions block, size_t shared_bytes, void** arguments) {
    if (!stacks) {
        void* memory = mmap(nullptr, MOST_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for stacks");
        stacks = static_cast<char*>(memory);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &before_us);
    }
    if (block.y != 1 || block.z != 1) fail("blocks of two dimensions are not emulated");
    if (shared_capacity != shared_bytes) {
        // As large as the launch says, up to a page that cannot be touched.
        const size_t page = 4096, pages = (shared_bytes + page - 1) / page * page;
        static void* mapped;
        static size_t mapped_bytes;
        if (mapped) munmap(mapped, mapped_bytes);
        mapped_bytes = pages + page;
        mapped = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) fail("no memory for shared memory");
        mprotect(static_cast<char*>(mapped) + pages, page, PROT_NONE);
        shared_memory = static_cast<char*>(mapped) + pages - (shared_bytes + 15) / 16 * 16;
        shared_capacity = shared_bytes;
    }
    const char* order = getenv("BKPACK_EMULATOR_ORDER");
    backwards = order && strcmp(order, "reverse") == 0;
    running = &kernel;
    running_arguments = arguments;
    block_size = block;
    grid_size = grid;
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                block_index = backwards ? Dimensions{grid.x - 1 - x, grid.y - 1 - y, grid.z - 1 - z} : Dimensions{x, y, z};
                // What a block does not write before it reads is NaN.
                if (shared_bytes) memset(shared_memory, 0xff, shared_bytes);
                std::fill(kernel.shared.begin, kernel.shared.end, char(0xff));
                run_block(block.x);
            }
        }
    }
    running = nullptr;
}

}  // namespace emulator
