// What the two halves of the emulator share: kernels by name, and running one of them.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "shim.h"

namespace emulator {

// A kernel: how to call it with pointers to its arguments, as the driver gets them.
struct Kernel {
    const char* name;
    std::vector<size_t> argument_bytes;
    void (*call)(void* function, void** arguments);
    void* function;
    unsigned most_threads;  // a block
    // The shared memory that is not sized by launches, of all kernels of its file.
    struct { char *begin, *end; } shared;
};

template <class... A, size_t... I>
inline void call_with(void (*function)(A...), void** arguments, std::index_sequence<I...>) {
    function(*static_cast<A*>(arguments[I])...);
}

template <class... A>
Kernel kernel(const char* name, void (*function)(A...), unsigned most_threads, decltype(Kernel::shared) shared) {
    auto call = [](void* function, void** arguments) {
        call_with(reinterpret_cast<void (*)(A...)>(function), arguments, std::index_sequence_for<A...>());
    };
    return {name, {sizeof(A)...}, call, reinterpret_cast<void*>(function), most_threads, shared};
}

// Every kernel of one source file; defined in the wrapper that build.sh makes for it.
const std::vector<Kernel>& kernels();

// Runs every block, one after the other. Fails (prints and aborts) where a card would hang, fault or be undefined.
void run(const Kernel& kernel, Dimensions grid, Dimensions block, size_t shared_bytes, void** arguments);

}  // namespace emulator
