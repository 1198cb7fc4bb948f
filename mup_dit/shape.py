"""What follows from a network's shape in every family, and what must fit in it."""

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from mup_dit.layers import attention_scale, require_width

SIZES = ("depth", "hidden_size", "num_heads", "patch_size", "input_size", "in_channels")


class NetworkShape:
    """Base of the families' configurations, whose fields it reads."""

    def check_shape(self, *more_sizes: str, divisor: int = 1, divided_for: str = "model.hidden_size") -> None:
        """Raises ConfigError for sizes below 1, a width that does not divide, or a latent that patches do not tile.

        Args:
            more_sizes: options of this family that must be at least 1.
            divisor: of the width, beside those of all families; ``divided_for`` names the option that needs it.
        """
        for name in (*SIZES, *more_sizes):
            require_at_least(f"model.{name}", getattr(self, name), 1)
        require_choice("model.attention_scale", self.attention_scale, ("sqrt", "mup"))
        require_width(divided_for, self.hidden_size, self.num_heads, divisor)
        if self.input_size % self.patch_size:
            raise ConfigError(f"model.input_size={self.input_size} is not divisible by patch_size={self.patch_size}.")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.input_size // self.patch_size

    @property
    def out_channels(self) -> int:
        """Channels of the output: twice those of the latent if the variance is learnt."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def scale(self) -> float:
        """Factor on q k^T."""
        return attention_scale(self.attention_scale, self.head_size, self.base_head_size or self.head_size)
