"""What a large picture took is the system's again when it is freed."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys
from hf_knn.data import give_back_large_blocks
def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 // 2**20
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "told" and not give_back_large_blocks():
    sys.exit(77)
def use(sizes):
    blocks = [libc.malloc(size * 2**20) for size in sizes]
    for block, size in zip(blocks, sizes):
        ctypes.memset(block, 1, size * 2**20)
    return blocks
libc.free(use([31])[0])  # from now on glibc keeps blocks of that size
before = held()
first, last = use([24, 24, 24, 1])[:3], use([1])  # the last one lies above them
for block in first:
    libc.free(block)
print(held() - before)
"""


def left_behind(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("another C library than glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_large_blocks_go_back_to_the_system() -> None:
    assert left_behind("told") < 12
    assert left_behind("not told") > 48
