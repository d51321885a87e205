"""Stage `demo`."""
import gin
@gin.configurable(module="slm_jax")
def demo(run_dir: str = "runs/demo", data: str | None = None): ...
