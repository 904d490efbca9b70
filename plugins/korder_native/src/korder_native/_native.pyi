"""The compiled kernels: addresses and strides in, results written where they are told to."""

View = tuple[int, int, int, int, int]

class Call:
    """One call as numbers; what each of them is stands in `cpp/call.hpp`."""

    order: int
    before: int
    kind: int
    number: int
    wide: bool
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

class Kernels:
    """The kernels of one instruction set."""

    name: str
    vector_bytes: int

    def forward(self, call: Call, /) -> None:
        """Compute output and lse."""

    def backward(self, call: Call, /) -> None:
        """Compute the gradients that have an address."""

    def forward_bytes(self, call: Call, /) -> int:
        """Return the memory that a forward takes beyond operands and results."""

    def backward_bytes(self, call: Call, /) -> int:
        """Return the memory that a backward takes beyond operands and results."""

    def find_wild(self, call: Call, backward: bool, marks: int, /) -> bool:
        """Mark the heads, (batch, key head), whose operands are NaN or could overflow; return whether there are any."""

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
