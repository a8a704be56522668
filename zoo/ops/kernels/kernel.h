// What a kernel shows to Python: the signatures of its functions, and the constants that its callers rely on.
//
// A function's parameters are, in this order, const pointers to what it reads, pointers to what it writes, and numbers.
// `ZOO_EXPORT(f)` after `extern "C" void f(...)` exports its signature, a letter a parameter: f d h l b for pointers to
// float, double, bfloat16, int64_t and bool that are read, capitals for those that are written, i for int64_t and x for
// double. `ZOO_SIZES({"C", C}, ...)`, once in a source, exports constants by name.
#pragma once
#include <cstdint>
#include <type_traits>

namespace zoo {

struct Size {
    const char* name;
    int64_t value;
};

template <typename T>
constexpr char letter() {
    using To = std::remove_cv_t<std::remove_pointer_t<T>>;
    constexpr bool number = std::is_same_v<T, int64_t> || std::is_same_v<T, double>;
    constexpr char of = std::is_same_v<To, float>                                   ? 'f'
                        : std::is_same_v<To, double>                                ? (number ? 'x' : 'd')
                        : std::is_same_v<To, uint16_t>                              ? 'h'
                        : std::is_same_v<To, int64_t>                               ? (number ? 'i' : 'l')
                        : std::is_same_v<To, bool> || std::is_same_v<To, uint8_t> ? 'b'
                                                                                    : '?';
    static_assert(of != '?' && (number || std::is_pointer_v<T>), "kernels take pointers, int64_t and double");
    return number || std::is_const_v<std::remove_pointer_t<T>> ? of : of - 'a' + 'A';
}

template <typename... T>
const char* signature(void (*)(T...)) {
    static const char letters[] = {letter<T>()..., '\0'};
    return letters;
}

}  // namespace zoo

#define ZOO_EXPORT(name) \
    extern "C" const char* name##_signature() { return zoo::signature(name); }
#define ZOO_SIZES(...)                                                  \
    extern "C" const zoo::Size* zoo_sizes() {                           \
        static const zoo::Size sizes[] = {__VA_ARGS__, {nullptr, 0}};   \
        return sizes;                                                   \
    }
