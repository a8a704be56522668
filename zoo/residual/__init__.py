"""Residual kinds: what carries the stream past the mixers, one file each."""

from zoo.residual.connection import Connection, Residual, ResidualText, register, residuals

__all__ = ["Connection", "Residual", "ResidualText", "register", "residuals"]
