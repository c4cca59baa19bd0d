"""Fused losses in the models of other libraries, one module for each library:

    from fastvae.integrations.diffusers import fuse, unfuse

    print(fuse(vae))  # what is fused, what is not and why
    unfuse(vae)

`fuse` exchanges methods of the object that it is given. The library's classes and modules, and all other objects, stay
as they are. The values, reductions and defaults stay those of the library. Importing this package imports none of the
libraries.
"""
