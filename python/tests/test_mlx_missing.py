"""Without MLX: `import tersor` works and does not look for it, and `tersor.mlx` says what is missing."""

import subprocess
import sys

WITHOUT_MLX = """
import sys
sys.modules["mlx"] = sys.modules["mlx.core"] = None
import tersor
assert not any(name.startswith("tersor.mlx") for name in sys.modules)
try:
    import tersor.mlx
except ImportError as error:
    print(error)
"""


def test_package_without_mlx():
    done = subprocess.run([sys.executable, "-c", WITHOUT_MLX], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tersor.mlx needs MLX" in done.stdout and "pip install" in done.stdout
