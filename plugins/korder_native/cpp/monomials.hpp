// One call of a kernel of the polynomial method as plain numbers, and the table of monomials that it walks.
#pragma once

#include "call.hpp"

namespace korder {

// The monomials of one degree in the order of the table, which is that of their columns: those that begin alike follow one
// another, so that the products that they begin with are made once.
struct Degree {
    std::int64_t count = 0;
    const std::int32_t* paths = nullptr;   // (count, degree): the columns that are multiplied
    const std::int32_t* levels = nullptr;  // (count): the first step in which a path differs from the one before
};

struct Monomials {
    std::int64_t width = 0, degree = 0, count = 0;
    const Degree* degrees = nullptr;        // degree + 1 of them
    const std::int64_t* offsets = nullptr;  // the monomials of lower degrees; one more closes it
};

// Tokens as somebody's memory has them (row and column strides), each column times a factor; closed tokens are zeros.
struct TokenColumns {
    Matrix rows;
    Number number = Number::float32;
    const double* factors = nullptr;     // (width); null where all are 1
    const std::uint8_t* open = nullptr;  // (tokens); null where all are
};

// What goes with a token: values, each times the token's weight, and the weight itself behind them if it is to be added.
struct TokenValues {
    Matrix rows;
    Number number = Number::float32;
    bool appends = false;
    const double* weights = nullptr;  // (tokens); null where all are 1
};

// What rows read becomes the mean of the polynomial of their centred score, and what certificates want beside it.
struct Finish {
    const double* coefficients = nullptr;  // (degree + 1), of the powers of the centred score
    const double* factors = nullptr;       // (degree + 1), what each degree of the table is to be multiplied with
    const void* sizes = nullptr;           // (count), in the dtype of the sums: what the absolute features read
    const double* size_factors = nullptr;  // (degree + 1), the same for these
    const double* centres = nullptr;       // (tokens)
    const std::uint8_t* live = nullptr;    // (tokens)
    double* moments = nullptr;             // (tokens, degree + 1), written: means of the powers of the centred score
    double* magnitude = nullptr;           // (tokens), written: the absolute terms over the mean
};

// `channels` are the numbers that go with a token. Tables are in the dtype of the sums: double if the call is wide.
struct FeatureCall {
    const Monomials* monomials = nullptr;
    bool wide = false;
    int threads = 1;
    std::int64_t tokens = 0, channels = 0;
    TokenColumns columns;
    TokenValues values;
    const double* shares = nullptr;  // (tokens, degree + 1): what each degree of a token's values is multiplied with
    const void* table = nullptr;     // (count, channels): what tokens read
    double* sums = nullptr;          // (count, channels), added to; reading: (tokens, channels), written
    double* absolute = nullptr;      // (count), added to
    const Finish* finish = nullptr;  // reading: how sums become means of the polynomial; null to write sums
    void* gradient = nullptr;            // (width, tokens), in the dtype of the sums
};

// What the modes' key states become for rows to read: see `read_table.hpp`.
struct TableCall {
    int order = 0;
    std::int64_t channels = 0;
    const double* sums[max_order] = {};      // (count, channels), the last channel being the weight
    const double* absolute[max_order] = {};  // (count)
    const double* weights = nullptr;         // (count): what each monomial is multiplied with
    double sign = 1.0;                       // of the scale, once for every degree
    void *values = nullptr, *sizes = nullptr;             // (count, channels) and (count), in the dtype of the sums
    double *factors = nullptr, *size_factors = nullptr;   // (degree + 1): what they were divided by
};

// One mode of keys that come into sight row by row, and their sums over those that came before.
struct RunningKeys {
    TokenColumns columns;
    TokenValues values;
    std::int64_t first = 0, length = 0;  // the key that the first row brings, and how many keys there are
    double* sums = nullptr;              // (count, channels), brought up to the last row
    double* absolute = nullptr;          // (count), the same
};

// Rows that read products of running sums; the call's tokens are the rows.
struct RunningCall {
    FeatureCall rows;
    int order = 0;
    RunningKeys modes[max_order];
    const void* weights = nullptr;  // (count), in the dtype of the sums: what each feature of a row is multiplied with
};

// The way back of a block of rows, the last one first: `sums` of the modes are those after the block and become those before
// it, the flows (gradients of the sums) those of the rows behind the block and then of its rows as well.
struct RunningBack {
    RunningCall call;
    const double* gradient = nullptr;    // (rows, channels): of the sums over tuples
    const double* shares = nullptr;      // (rows, degree + 1): what it is multiplied with in each degree
    double* flows[max_order] = {};       // (count, channels), added to
    void* of_columns[max_order + 1] = {};  // (width, rows), written, in the dtype of the sums: of keys, and last of the rows
    double* of_values[max_order] = {};   // (rows, channels), written
};

// What is done with the features of all tokens: summed with values, multiplied with a table, or differentiated.
enum class Work : int { sums, reading, gradient };

}  // namespace korder
