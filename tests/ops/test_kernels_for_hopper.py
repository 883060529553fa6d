"""Proves that the kernels compile for a Hopper GPU as they are launched, on a machine without one.

The launches of a pass are recorded in place of being made, and compiled with their arguments' types. The
interpreter proves what they compute; what it takes no notice of is seen here: code that does not compile,
shared memory that a processor does not have, registers that overflow into memory.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from fairseq_flash import ops

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fairseq_flash.ops.mixed_chunk import kernel, step_kernel  # noqa: E402

TARGET = GPUTarget("cuda", 90, 32)
#: Bytes of shared memory for a program.
SHARED = 227 * 1024
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
#: Bytes a thread: a few registers that are written once and read once, at most.
SPILLED = 48
LAUNCH = {"num_warps", "num_stages", "maxnreg"}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}


@pytest.fixture
def launches(monkeypatch):
    """What is launched: kernels, arguments and constants."""
    found = []
    monkeypatch.setattr(kernel, "_start", lambda *args, **constants: found.append((args, constants)))
    monkeypatch.setattr(torch, "baddbmm", lambda *args, **rest: None)
    return found


def compiled(launched, programs, *args, **constants):
    """A launch's kernel, compiled as Triton does for these arguments: spilled bytes and shared memory."""
    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(launched.arg_names):
        value = args[place] if place < len(args) else constants[name]
        if launched.params[place].is_constexpr or value is None:
            signature[name], constexprs[place,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[place,] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if value % 16 == 0 and name not in launched.do_not_specialize:
                attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(launched, signature, constexprs, attributes)
    options = {name: constants[name] for name in LAUNCH & constants.keys() if constants[name] is not None}
    found = triton.compile(source, target=TARGET, options=options)
    # A stride of less than 2^31 is passed in 32 bits; so would its multiples be.
    assert not re.search(r"muli %copy_stride\S*, \S+ : i32", found.asm["ttir"]), launched.fn.__name__
    return _spilled(found.asm["cubin"]), found.metadata.shared


def _spilled(cubin):
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    words = [TOOLS / "cuobjdump", "-res-usage", path]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", found)[1])


needs_tools = pytest.mark.skipif(
    not (TOOLS / "cuobjdump").exists(), reason="this Triton comes without NVIDIA's tools"
)


@needs_tools
@pytest.mark.parametrize(
    ("b", "causal", "fading", "dtype"),
    [
        (8, True, False, torch.bfloat16),
        (2, True, False, torch.float16),
        (8, False, False, torch.float32),
        (8, True, True, torch.bfloat16),
        (2, True, True, torch.bfloat16),
        (8, True, True, torch.float32),
    ],
    ids=["many rows", "few rows", "bidirectional", "fading", "fading, few rows", "fading, float32"],
)
def test_what_is_launched_compiles_and_fits(launches, monkeypatch, tmp_path, b, causal, fading, dtype):
    """The fading ones with keys and a carry."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    options, n, e, s = ops.Options(256, causal, "fading" if fading else "mean"), 600, 1536, 128
    uvz, gamma, bias = (torch.zeros(size, dtype=dtype) for size in ((b, n, 2 * e + s), (4, s), (256, 256)))
    keys, carry = None, None
    if fading:
        keys = torch.zeros(b, n, s, dtype=dtype).requires_grad_()
        carry = ops.Carry(torch.zeros(b, s, e).float().requires_grad_(), torch.zeros(b, dtype=torch.long))
    angles = torch.zeros(2, n, s // 2).float()
    projected = ops.Projected(uvz.requires_grad_(), gamma, gamma, *angles, bias, keys=keys)
    kernel.run(projected, options, carry).sum().backward()
    once = {(args[0], len(args), *constants.items()): (args, constants) for args, constants in launches}
    names = {args[0].fn.__name__ for args, _ in once.values()}
    assert {"copies_kernel", "scores_kernel", "pairs_backward_kernel", "base_backward_kernel"} < names
    assert {"states_kernel", "output_kernel", "values_backward_kernel"} < names
    serial = {constants["SERIAL"] for args, constants in launches if "SERIAL" in constants}
    assert serial == {b > 2}
    for args, constants in once.values():
        spilled, shared = compiled(*args, **constants)
        assert shared <= SHARED, args[0].fn.__name__
        assert spilled <= SPILLED, args[0].fn.__name__


@needs_tools
@torch.no_grad()
@pytest.mark.parametrize("keyed", [False, True], ids=["", "keys"])
@pytest.mark.parametrize("norm", ["mean", "fading"])
def test_a_step_compiles_and_fits(monkeypatch, tmp_path, norm, keyed):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found, (e, s, c), dtype = [], (1536, 128, 256), torch.bfloat16

    class Recorded:
        """A kernel whose launches are recorded."""

        def __init__(self, launched):
            self.launched = launched

        def __getitem__(self, programs):
            return lambda *args, **constants: found.append(((self.launched, programs, *args), constants))

    for name in ("_attend", "_remember"):
        monkeypatch.setattr(step_kernel, name, Recorded(getattr(step_kernel, name)))
    keys = torch.zeros(1, 1, s, dtype=dtype) if keyed else None
    angles = torch.zeros(2, 1, 1, s // 2).float()
    gamma = torch.zeros(4, s, dtype=dtype)
    uvz, bias = torch.zeros(1, 1, 2 * e + s, dtype=dtype), torch.zeros(c, dtype=dtype)
    projected = ops.Projected(uvz, gamma, gamma, *angles, bias, keys=keys)
    state = ops.ChunkState.empty(torch.zeros(1, 0, dtype=dtype), c, s, e)
    step_kernel.run(projected, ops.Options(c, True, norm), state)
    assert len(found) == 2
    for args, constants in found:
        spilled, shared = compiled(*args, **constants)
        assert shared <= SHARED, args[0].fn.__name__
        assert spilled <= SPILLED, args[0].fn.__name__
