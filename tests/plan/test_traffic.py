"""What a layer moves on a GPU between its matrix products and WKV: counted, bounded, and as `plan` has it."""

import pytest
from traffic import CHANNELS, LANES, TOKENS, of_a_layer

from rwkv_train.plan.sizes import RWKV4Sizes, RWKV7Sizes


@pytest.mark.parametrize(("sizes", "most_gb"), [(RWKV4Sizes, 15.5), (RWKV7Sizes, 23)])
def test_every_number_is_read_and_written_once(sizes, most_gb):
    """20 and 25 GB are the targets; what was made before the operations were fused moved 61 and 125."""
    moved, calls, between = of_a_layer(sizes.name, CHANNELS, LANES, TOKENS)
    assert between < most_gb * 1e9, moved
    assert sum(n for name, n in calls.items() if name.startswith("rwkv_train::wkv")) == 2, "not by our kernels"
    half = of_a_layer(sizes.name, CHANNELS, LANES, TOKENS // 2)[2]
    assert (between - half) * 2 / (LANES * TOKENS * CHANNELS) == pytest.approx(sizes.between, rel=0.01)
