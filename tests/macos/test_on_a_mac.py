"""What tests do on a Mac, where its own GPU takes the place of the stand-in."""

import pytest
import standin_build


def test_a_test_that_needs_the_stand_in_is_left_out_by_name():
    gpu = standin_build.MetalDevice()
    gpu.mode = "typed"
    assert gpu.fallbacks() == []
    assert hasattr(gpu.native, "DecodePlan")
    for use, name in (
        (lambda: gpu.plan_statistics(), "plan_statistics"),
        (lambda: setattr(gpu, "mode", "check"), "mode"),
        (lambda: setattr(gpu, "refusal", "error"), "refusal"),
    ):
        with pytest.raises(pytest.skip.Exception, match=f"'{name}', which only the stand-in"):
            use()
