"""Whether torch.compile works is found out, not assumed."""

import pytest
import torch

from fit3d_ns.support.compiling import can_compile


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    cuda = torch.device("cuda")
    assert not can_compile.__wrapped__(torch.device("cpu"))
    with monkeypatch.context() as patched:
        patched.setenv("TORCH_COMPILE_DISABLE", "1")
        assert not can_compile.__wrapped__(cuda)

    def fail(function):
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.warns(UserWarning, match=r"does not work here \(Failed to find C compiler\.\): training"):
        assert not can_compile.__wrapped__(cuda)
