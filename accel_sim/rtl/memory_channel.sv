// One channel to a memory, for loads and stores: an arbiter, a counter of bytes, and the memory's latency.
//
// The oldest request is served first; of a store and a load of the same cycle, the store (`ties` 0), or the load
// (`ties` 1, for comparison). A request occupies the channel for as many cycles as its bytes take at `rate`, beginning
// with the one in which it is taken. Its bytes are through `latency` cycles later; with `pipelined` the channel takes
// the next request meanwhile.
module memory_channel #(
    parameter BYTES_BITS = 24,
    parameter STAMP_BITS = 32,
    parameter TAG_BITS = 2,
    parameter LATENCY_BITS = 7
) (
    input  logic                    clk,
    input  logic                    reset,
    input  logic                    enable,
    input  logic                    ties,
    input  logic                    pipelined,
    input  logic [LATENCY_BITS-1:0] latency,
    input  logic [  BYTES_BITS+7:0] rate,         // in 1/256 bytes per cycle, from 1 on
    input  logic                    load_valid,
    input  logic [  BYTES_BITS-1:0] load_bytes,   // from 1 on
    input  logic [    TAG_BITS-1:0] load_tag,
    input  logic [  STAMP_BITS-1:0] load_stamp,
    output logic                    load_take,
    output logic                    load_done,    // in the cycle of its last byte
    output logic [    TAG_BITS-1:0] load_done_tag,
    input  logic                    store_valid,
    input  logic [  BYTES_BITS-1:0] store_bytes,
    input  logic [  STAMP_BITS-1:0] store_stamp,
    output logic                    store_take,
    output logic                    store_done
);
  localparam ENTRY = 2 + TAG_BITS;

  logic busy, waiting, kept_is_store;
  logic [TAG_BITS-1:0] kept_tag;
  logic [BYTES_BITS+7:0] kept_left;

  // the arbiter
  wire free = enable && !busy && !waiting;
  wire store_first = store_stamp < load_stamp || (store_stamp == load_stamp && !ties);
  assign store_take = free && store_valid && (!load_valid || store_first);
  assign load_take = free && load_valid && !store_take;

  // the bytes
  wire taken = store_take || load_take;
  wire beat = taken || busy;
  wire is_store = taken ? store_take : kept_is_store;
  wire [TAG_BITS-1:0] tag = taken ? load_tag : kept_tag;
  wire [BYTES_BITS+7:0] left = taken ? {store_take ? store_bytes : load_bytes, 8'd0} : kept_left;
  wire last = beat && left <= rate;

  // the latency: a ring that is written every cycle
  logic [(ENTRY<<LATENCY_BITS)-1:0] ring;
  logic [LATENCY_BITS-1:0] now;
  wire [LATENCY_BITS-1:0] then = now - latency;
  wire [ENTRY-1:0] entering = {last && is_store, last && !is_store, tag};
  assign {store_done, load_done, load_done_tag} =
      latency == {LATENCY_BITS{1'b0}} ? entering : ring[then*ENTRY+:ENTRY];

  always_ff @(posedge clk) begin
    if (reset) begin
      busy <= 1'b0;
      waiting <= 1'b0;
      ring <= {ENTRY << LATENCY_BITS{1'b0}};
      now <= {LATENCY_BITS{1'b0}};
    end else begin
      busy <= beat && !last;
      waiting <= (waiting || (last && !pipelined)) && !(store_done || load_done);
      ring[now*ENTRY+:ENTRY] <= entering;
      now <= now + 1'b1;
    end
    kept_is_store <= is_store;
    kept_tag <= tag;
    kept_left <= left - rate;
  end
endmodule
