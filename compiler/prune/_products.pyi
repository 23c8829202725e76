import numpy as np
import numpy.typing as npt

def available_isas() -> list[str]: ...
def add_products(
    gram: npt.NDArray[np.float32],
    cross: npt.NDArray[np.float32],
    activations: npt.NDArray[np.uint16] | npt.NDArray[np.float32],
    targets: npt.NDArray[np.uint16] | npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    *,
    num_threads: int,
    isa: str = "auto",
) -> None: ...
