from typing import Any

import numpy as np
import numpy.typing as npt

def available_isas() -> list[str]: ...
def round_matrix(
    weights: npt.NDArray[np.uint16] | npt.NDArray[np.float32],
    kind: str,
    moments: npt.NDArray[np.float32] | None,
    *,
    num_threads: int,
    isa: str = "auto",
) -> tuple[npt.NDArray[Any], ...]: ...
