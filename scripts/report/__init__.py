"""Figures and pages made of tables."""
