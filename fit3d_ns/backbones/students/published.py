"""The fine-tuned backbones that FiT3D's authors published (arXiv 2407.20229; MIT). Light: knows names, imports no timm.

https://github.com/ywyue/FiT3D loads them under the same names. Each is read after the last block and the final norm,
and was trained on images normalised with ImageNet's mean and std, whatever the backbone.
"""

from dataclasses import dataclass

PUBLISHED_REPOSITORY = "yuanwenyue/FiT3D"
PUBLISHED_REVISION = "f52f1f99818cc15718933d3fe6d4bef4d96ada78"
"""The commit that the hashes were taken from."""


@dataclass(frozen=True)
class PublishedBackbone:
    """One weight file: a bare timm state dict."""

    name: str
    """What the user types."""
    original: str
    """The registry's name of the backbone that was fine-tuned."""
    filename: str
    """In the repository."""
    sha256: str
    """Of the file."""


PUBLISHED_BACKBONES: dict[str, PublishedBackbone] = {
    f"{original}_fine": PublishedBackbone(f"{original}_fine", original, f"{original}_finetuned.pth", sha256)
    for original, sha256 in (
        ("dinov2_small", "4200dd523f9af5bee0cf1997ca4f485706bdfcf6b08894f28b7a8529d858658f"),
        ("dinov2_base", "8709de2a942cd9ed455a2289d3ee91897039846aa1fcfe30c80200921b45416e"),
        ("dinov2_reg_small", "09db495b0788df23591de1bc9ccb721b182dfb511136398a2caed3896a39c8e4"),
        ("clip_base", "8d3c303d408815146a06061d6521e7c4293ddb51662fc4a5c00d702b51cee394"),
        ("mae_base", "d83dc2a8c238103b53b5de42d389d8507243ffa16a1c24ad281b3457a0c45d05"),
        ("deit3_base", "76037057ee0dda1334a886a313674eb93edf639f7500c70a21b26583f0bb8063"),
    )
}
