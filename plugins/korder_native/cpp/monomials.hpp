// One call of a kernel of the polynomial method as plain numbers, and the table of monomials that it walks.
#pragma once

#include <cstdint>

namespace korder {

// The monomials of one degree, in the order in which walking their tree from the root comes by them: those that share
// a parent follow one another, and so do those that share its parent.
struct Degree {
    std::int64_t count = 0;
    const std::int32_t* paths = nullptr;   // (count, degree): the columns that are multiplied, from the root on
    const std::int32_t* levels = nullptr;  // (count): the first step in which a path differs from the one before
    const std::int32_t* rows = nullptr;    // (count): where the monomial lies in the user's table
};

struct Monomials {
    std::int64_t width = 0, degree = 0, count = 0;
    const Degree* degrees = nullptr;        // degree + 1 of them
    const std::int64_t* offsets = nullptr;  // the monomials of lower degrees; one more closes it
};

// `channels` are the columns of what goes with a token: values, and the token's weight behind them. Numbers of the
// tokens' own dtype are `float` or, if the call is wide, `double`.
struct FeatureCall {
    const Monomials* monomials = nullptr;
    bool wide = false;
    int threads = 1;
    std::int64_t tokens = 0, channels = 0;
    const void* columns = nullptr;     // (width, tokens), own dtype
    const void* values = nullptr;      // (tokens, channels), own dtype; double where there are shares
    const double* shares = nullptr;    // (tokens, degree + 1): what each degree of a token's values is multiplied with
    const void* table = nullptr;       // (count, channels), own dtype: what tokens read
    const void* sizes = nullptr;       // (count), own dtype: what the absolute features read
    const std::uint8_t* live = nullptr;  // (tokens); null where all are
    double* sums = nullptr;            // (count, channels), added to; reading: (tokens, channels), written
    double* absolute = nullptr;        // (count), added to; reading: (tokens, degree + 1), written
    double* powers = nullptr;          // reading: (tokens, degree + 1), the last channel of every degree by itself
    void* gradient = nullptr;          // (width, tokens), own dtype
};

// What is done with the features of all tokens: summed with values, multiplied with a table, or differentiated.
enum class Work : int { sums, reading, gradient };

}  // namespace korder
