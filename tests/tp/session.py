from contextlib import contextmanager
import torch
from megatron.core import parallel_state

@contextmanager
def model_parallel(tp, *, seed=1234):
    torch.cuda.current_device = lambda: torch.device("cpu")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
