"""Tests of what cluster/ holds."""
