from typing import Literal

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.uint16] | npt.NDArray[np.float32]

def available_isas() -> list[str]: ...
def norm(
    x: Values, weight: Values, out: Values, *, eps: float, offset: float, num_threads: int, isa: str = "auto"
) -> None: ...
def gate(
    gate: Values, up: Values, *, act: Literal["silu", "gelu_tanh"], num_threads: int, isa: str = "auto"
) -> None: ...
def turn(x: Values, cos: Values, sin: Values, *, num_threads: int, isa: str = "auto") -> None: ...
