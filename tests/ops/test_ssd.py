from tests.ops.contract import LinearRecurrenceContract
from tests.ops.inputs import SIZE, SSD, Size


class TestScan(LinearRecurrenceContract):
    op = SSD
    implementation = "scan"
    parts = (31, 1, 31, 1, 1)
    sizes = (Size(2, 5, 3, 3, 12, 5),)
    border = 32
    short = 5
    long = SIZE


class TestChunked(LinearRecurrenceContract):
    op = SSD
    implementation = "chunked"
