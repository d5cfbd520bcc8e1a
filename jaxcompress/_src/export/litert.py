"""LiteRT."""


class LitertInfo: ...


def save_litert(): ...
