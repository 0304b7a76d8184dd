-- Run once, by the superuser, when the image makes the database. Afterwards the superuser has no password and gets
-- in through 'docker compose exec postgres psql -U postgres' alone.
-- The passwords may have been set before (docs/server.md).
\if :{?password}
\else
\set password `cat /run/secrets/postgres_password`
\set reader_password `cat /run/secrets/reader_password`
\endif
CREATE ROLE tuner LOGIN PASSWORD :'password';
CREATE ROLE tuner_reader LOGIN PASSWORD :'reader_password';
ALTER ROLE tuner_reader SET default_transaction_read_only = on;
CREATE DATABASE tuner OWNER tuner;
REVOKE ALL ON DATABASE tuner FROM PUBLIC;
GRANT CONNECT ON DATABASE tuner TO tuner_reader;
\connect tuner
GRANT USAGE ON SCHEMA public TO tuner_reader;
ALTER DEFAULT PRIVILEGES FOR ROLE tuner GRANT SELECT ON TABLES TO tuner_reader;
ALTER ROLE postgres PASSWORD NULL;
