"""The compiled kernels: addresses and strides in, results written where they are told to."""

View = tuple[int, int, int, int, int]

class Call:
    """One call as numbers; what each of them is stands in `cpp/call.hpp`."""

    order: int
    before: int
    kind: int
    number: int
    wide: bool
    narrow: bool
    threads: int
    batch: int
    heads: int
    groups: int
    queries: int
    width: int
    value_width: int
    scale: float
    memory: int

    def __init__(self) -> None: ...
    def set_mode(self, place: int, length: int, window: int, by_row: bool, /) -> None:
        """Say how long a mode is, its window if it has one, and whether its bias differs between queries."""

    def set_operands(
        self,
        query: View,
        keys: list[View],
        values: list[View],
        masks: list[View | None],
        biases: list[View | None],
        query_offset: int,
        key_offsets: list[int],
        /,
    ) -> None:
        """Say where the operands lie."""

    def set_results(self, output: int, lse: int, /) -> None:
        """Say where output and lse lie, dense."""

    def set_gradients(
        self,
        output: View,
        lse: int | None,
        query: int | None,
        keys: list[int | None],
        values: list[int | None],
        biases: list[View | None],
        /,
    ) -> None:
        """Say where the gradients lie that come in, and those that go out, dense, which are added to."""

    def skip(self, marks: int, /) -> None:
        """Say where the marks of the heads lie, (batch, key head), that are left alone."""

class Monomials:
    """The monomials of the polynomial method, in the order in which the kernels walk them; see `cpp/monomials.hpp`."""

    def __init__(self, width: int, /) -> None: ...
    def add(self, count: int, paths: int, levels: int, /) -> None:
        """Add those of the next degree; the arrays of int32 at the addresses are copied."""

class Finish:
    """How what rows read becomes means of a polynomial: addresses of what stands in `cpp/monomials.hpp`."""

    def __init__(
        self,
        coefficients: int | None,
        factors: int | None,
        sizes: int | None,
        size_factors: int | None,
        centres: int | None,
        live: int | None,
        moments: int | None,
        magnitude: int | None,
        /,
    ) -> None: ...

class FeatureCall:
    """The sizes of a pass over the features of tokens; the threads are cut to what the work is worth."""

    def __init__(self, monomials: Monomials, wide: bool, threads: int, tokens: int, channels: int, /) -> None: ...
    def set_columns(self, rows: View, number: int, factors: int | None, open: int | None, /) -> None:
        """Say where tokens lie, their dtype, what each column is multiplied with, and which tokens are not zeros."""

    def set_values(self, rows: View, number: int, appends: bool, weights: int | None, /) -> None:
        """Say where values lie, their dtype, whether weights go behind them, and the weights, None for ones."""

class RunningCall:
    """Rows, each of which reads the sums over the keys up to its own; what they are multiplied with, by feature."""

    def __init__(self, rows: FeatureCall, weights: int | None, /) -> None: ...
    def add_mode(self, keys: FeatureCall, first: int, sums: int | None, absolute: int | None, /) -> None:
        """Add the keys of a mode, the one that comes with the first row, and the sums over those before."""

class Kernels:
    """The kernels of one instruction set."""

    name: str
    vector_bytes: int
    narrows: bool

    def forward(self, call: Call, /) -> None:
        """Compute output and lse."""

    def backward(self, call: Call, /) -> None:
        """Compute the gradients that have an address."""

    def forward_bytes(self, call: Call, /) -> int:
        """Return the memory that a forward takes beyond operands and results."""

    def backward_bytes(self, call: Call, /) -> int:
        """Return the memory that a backward takes beyond operands and results."""

    def find_wild(self, call: Call, backward: bool, marks: int, /) -> tuple[bool, bool]:
        """Mark the heads, (batch, key head), whose operands are NaN or could overflow.

        Returned is whether there are any, and whether scores may be so large that two orders of summation differ as
        much as bfloat16 rounds.
        """

    def feature_sums(self, call: FeatureCall, shares: int | None, sums: int | None, absolute: int | None, /) -> None:
        """Add the sums over tokens of features times values, and of absolute features times the last value."""

    def read_table(
        self,
        call: FeatureCall,
        sums: list[int | None],
        absolute: list[int | None],
        weights: int | None,
        sign: float,
        values: int | None,
        sizes: int | None,
        factors: int | None,
        size_factors: int | None,
        /,
    ) -> None:
        """Write the table that rows read, out of the modes' key states; see `cpp/read_table.hpp`."""

    def read_features(self, call: FeatureCall, entries: int | None, sums: int | None, finish: Finish | None, /) -> None:
        """Write features times a table; finished, the means of the polynomial and what certificates want."""

    def read_running(self, call: RunningCall, sums: int | None, finish: Finish, /) -> None:
        """Write the means of rows, and bring the sums of every mode up to the last row."""

    def running_back(
        self,
        call: RunningCall,
        gradient: int | None,
        shares: int | None,
        flows: list[int],
        of_columns: list[int],
        of_values: list[int],
        /,
    ) -> None:
        """Go back through rows: write the gradients of columns and values, add to the flows, take sums back."""

    def running_bytes(self, call: RunningCall, /) -> int:
        """Return the memory that it takes."""

    def feature_gradient(
        self, call: FeatureCall, shares: int | None, entries: int | None, gradient: int | None, /
    ) -> None:
        """Write the gradient of the columns, that of the features being a table times values."""

    def column_facts(self, call: FeatureCall, weights: int | None, peaks: int | None, totals: int | None, /) -> None:
        """Write each column's largest finite magnitude and weighted sum, over open tokens."""

    def token_products(self, call: FeatureCall, factors: int | None, products: int | None, /) -> None:
        """Write the sum of each token's columns, each times a factor."""

    def feature_bytes(self, call: FeatureCall, work: int, /) -> int:
        """Return the memory that a pass takes: 0 sums, 1 reading, 2 gradient."""

    def exponential(self, wide: bool, numbers: int, count: int, /) -> None:
        """Replace numbers up to 0 by their exponentials."""

def kernels(isa: str, /) -> Kernels:
    """Return the kernels of an instruction set, of the best one for an empty name."""

def known_names() -> list[str]:
    """Return the instruction sets that were compiled, best first."""

def runs_here(isa: str, /) -> bool:
    """Return whether this processor has an instruction set."""

def thread_limit() -> int:
    """Return the threads that OpenMP would take."""
