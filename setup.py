from configparser import ConfigParser
from setuptools import setup

settings = ConfigParser()
settings.read('settings.ini', encoding='utf-8')
needs = {k.removesuffix('requirements').rstrip('_'): v.split('\n')[1:] for k,v in settings['DEFAULT'].items()}
setup(install_requires=needs.pop(''), extras_require=needs)
