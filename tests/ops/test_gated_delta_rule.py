from tests.ops.contract import LinearRecurrenceContract
from tests.ops.inputs import GATED_DELTA_RULE, SIZE, Size


class TestScan(LinearRecurrenceContract):
    op = GATED_DELTA_RULE
    implementation = "scan"
    parts = (31, 1, 31, 1, 1)
    sizes = (Size(2, 5, 3, 3, 12, 5),)
    border = 32
    short = 5
    long = SIZE


class TestChunked(LinearRecurrenceContract):
    op = GATED_DELTA_RULE
    implementation = "chunked"
